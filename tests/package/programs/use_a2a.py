"""An agent of A2A's with our request handler."""

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import AgentCapabilities, AgentCard

from streamkeep import StreamManager
from streamkeep.integrations.a2a import StreamRequestHandler


class Answers(AgentExecutor):
    async def execute(self, context, event_queue):
        raise NotImplementedError

    async def cancel(self, context, event_queue):
        raise NotImplementedError


card = AgentCard(name="answers", description="Answers", version="1", capabilities=AgentCapabilities(streaming=True))
handler = StreamRequestHandler(StreamManager.connect("sqlite:///streams.db"), Answers(), InMemoryTaskStore(), card)
assert callable(handler.lifespan)
