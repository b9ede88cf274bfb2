"""`useChat` of the AI SDK as its package comes, in StrictMode: never ready with half an answer, as `docs/how-to/ai-sdk.md` has it."""

from collections.abc import Callable

from tests.clients.chats import WHOLE, answers, served
from tests.clients.conftest import Start
from tests.clients.programs import Event


def shows(status: str, *texts: str) -> Callable[[Event], bool]:
    """Give what says whether a chat has this status, and shows these answers."""
    return lambda event: event["event"] == status and answers(event) == list(texts)


async def test_an_answer_is_whole(start: Start) -> None:
    async with served() as server, start("useChat", server.url) as page:
        (reading,) = await page.read("useChat", [{"url": server.url, "chat": "c", "ask": "why?"}])
        await reading.when(shows("ready", WHOLE))
        assert {event["event"] for event in reading.events} <= {"ready", "submitted", "streaming"}
    assert server.runs == {"why?": 1}
