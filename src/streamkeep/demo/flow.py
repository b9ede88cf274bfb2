"""The flow `answer`, and the small model behind it: it answers every question with the beginning of "Alice in Wonderland".

The model streams token by token at the pace of a real one. It is here so that the demo needs neither a key nor a network;
any other Genkit plugin may take its place.
"""

import asyncio
import re
from importlib.resources import files
from typing import Any, Final

from .._extras import needed_by

with needed_by(__name__, "demo"):
    from genkit import (
        ActionRunContext,
        FinishReason,
        Genkit,
        GenkitError,
        Message,
        ModelResponse,
        ModelResponseChunk,
        Part,
        Role,
    )
    from genkit.model import ModelInfo, ModelRequest, Supports, model, model_action_metadata
    from genkit.plugin_api import Action, ActionKind, ActionMetadata, Plugin

TEXT: Final = files("streamkeep.demo").joinpath("alice.txt").read_text(encoding="utf-8").strip()
"""Lewis Carroll, "Alice's Adventures in Wonderland" (1865), from chapter I. In the public domain."""

TOKENS: Final = re.findall(r"\s*\S+", TEXT)
MODEL: Final = "storyteller/alice"


class Storyteller(Plugin):
    """A Genkit plugin with one model, which tells one story.

    Args:
        tokens_per_second: how fast.
    """

    name = "storyteller"

    def __init__(self, tokens_per_second: float) -> None:
        self._pause = 1 / tokens_per_second

    async def init(self) -> list[Action[Any, Any, Any, Any]]:
        """See `Plugin.init`."""
        return []

    async def resolve(self, action_type: ActionKind, name: str) -> Action[Any, Any, Any, Any] | None:
        """See `Plugin.resolve`."""
        if action_type is not ActionKind.MODEL or name != MODEL:
            return None
        info = ModelInfo(label="Storyteller", supports=Supports(multiturn=True, media=False, tools=False))
        return model(MODEL, self._generate, info=info)

    async def list_actions(self) -> list[ActionMetadata]:
        """See `Plugin.list_actions`."""
        return [model_action_metadata(MODEL)]

    async def _generate(self, _request: ModelRequest[Any], ctx: ActionRunContext[ModelResponseChunk]) -> ModelResponse[Any]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for token in TOKENS:
            ctx.send_chunk(ModelResponseChunk(role=Role.MODEL, content=[Part(text=token)]))
            # By the clock, so that short pauses that turn out longer do not add up.
            due += self._pause
            await asyncio.sleep(due - loop.time())
        return ModelResponse(message=Message(role=Role.MODEL, content=[Part(text=TEXT)]), finish_reason=FinishReason.STOP)


def answer_flow(tokens_per_second: float = 30.0) -> Action[Any, Any, Any, Any]:
    """Give the flow `answer`: a question in, the answer's text out, and its tokens as chunks."""
    ai = Genkit(plugins=[Storyteller(tokens_per_second)], model=MODEL)

    @ai.flow()
    async def answer(question: str, ctx: ActionRunContext[str]) -> str:
        generation = ai.generate_stream(prompt=question)
        try:
            async for chunk in generation.stream:
                if ctx.abort_signal.is_set():
                    raise GenkitError(status="CANCELLED", message="nobody wants the rest of the answer")
                ctx.send_chunk(chunk.text)
            return (await generation.response).text
        finally:
            # `generate_stream` works in a task of its own, which would go on, and be paid for, without us.
            asyncio.ensure_future(generation.response).cancel()

    return answer
