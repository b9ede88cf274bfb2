"""What `UIMessagesFraming` makes of a producer's chunks, as the AI SDK itself reads it: by its own schema, in Node."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph  # pyright: ignore[reportMissingTypeStubs]  # it has none
from tests.clients.programs import NODE, PACKAGES, node
from tests.http.test_framing import CANCELLED, FAILED, body_of, events_of
from tests.test_docs import ROOT, blocks

from streamkeep.events import ErrorInfo
from streamkeep.http import UIMessagesFraming
from streamkeep.http.ui_parts import REQUIRED

SEED: Final = 20261129
MIB: Final = 1 << 20
TOOL: Final = {"toolCallId": "call-1", "toolName": "weather"}
KEYS: Final = (
    "id",
    "delta",
    "data",
    "url",
    "title",
    "errorText",
    "toolCallId",
    "kind",
    "providerMetadata",
    "finishReason",
    "reason",
)
TEXT: Final = {"state": "done", "type": "text"}

pytestmark = pytest.mark.usefixtures("packages")

Told = list[tuple[str, Any]]


async def read(*bodies: str) -> list[Told]:
    """Give what the AI SDK makes of each body."""
    async with node(NODE, "ui-messages.js") as program:
        readings = await program.read("", [{"body": body} for body in bodies])
        return [[(event["event"], json.loads(event["data"])) for event in await reading.end()] for reading in readings]


def framed(*chunks: object, end: object = None, error: ErrorInfo | None = None) -> str:
    """Give a whole answer; the stream's id is 0."""
    return body_of(UIMessagesFraming(), events_of(*chunks, end=end, error=error))


async def parts_of(*chunks: object, end: object = None, error: ErrorInfo | None = None) -> Any:
    """Give the parts of the message that chunks become. All are taken, and nothing is wrong with them."""
    (told,) = await read(framed(*chunks, end=end, error=error))
    assert {name for name, _ in told} == {"part", "message"}
    return told[-1][1]["parts"]


PARTS: Final[dict[str, tuple[Sequence[object], Sequence[object]]]] = {
    "text": (["One ", "two"], [{**TEXT, "text": "One two"}]),
    "text of its own": (
        [
            {"type": "text-start", "id": "t"},
            {"type": "text-delta", "id": "t", "delta": "é\u2028"},
            {"type": "text-end", "id": "t"},
        ],
        [{**TEXT, "text": "é\u2028"}],
    ),
    "reasoning, then text": (
        [
            {"type": "reasoning-start", "id": "r", "providerMetadata": None},
            {"type": "reasoning-delta", "id": "r", "delta": "hm"},
            {"type": "reasoning-end", "id": "r"},
            "so",
        ],
        [{"type": "reasoning", "id": "r", "text": "hm", "state": "done"}, {**TEXT, "text": "so"}],
    ),
    "a tool, its input piece by piece, between texts": (
        [
            "before",
            {"type": "tool-input-start", **TOOL},
            {"type": "tool-input-delta", "toolCallId": "call-1", "inputTextDelta": '{"city"'},
            {"type": "tool-input-delta", "toolCallId": "call-1", "inputTextDelta": ':"Bern"}'},
            {"type": "tool-input-available", **TOOL, "input": {"city": "Bern"}},
            {"type": "tool-output-available", "toolCallId": "call-1", "output": None},
            "behind",
        ],
        [
            {**TEXT, "text": "before"},
            {
                "type": "tool-weather",
                "toolCallId": "call-1",
                "state": "output-available",
                "input": {"city": "Bern"},
                "output": None,
            },
            {**TEXT, "text": "behind"},
        ],
    ),
    "a tool that fails": (
        [
            {"type": "tool-input-available", **TOOL, "input": None},
            {"type": "tool-output-error", "toolCallId": "call-1", "errorText": "rain"},
        ],
        [{"type": "tool-weather", "toolCallId": "call-1", "state": "output-error", "input": None, "errorText": "rain"}],
    ),
    "data, twice the same": (
        [{"type": "data-rain", "id": "d", "data": {"mm": 1}}, {"type": "data-rain", "id": "d", "data": None}],
        [{"type": "data-rain", "id": "d", "data": None}],
    ),
    "sources and files, the text going on over a source": (
        [
            "see ",
            {"type": "source-url", "sourceId": "s", "url": "https://example.org", "title": None},
            "there",
            {"type": "source-document", "sourceId": "p", "mediaType": "application/pdf", "title": "A page"},
            {"type": "file", "url": "data:text/plain,x", "mediaType": "text/plain"},
        ],
        [
            {**TEXT, "text": "see there"},
            {"type": "source-url", "sourceId": "s", "url": "https://example.org"},
            {"type": "source-document", "sourceId": "p", "mediaType": "application/pdf", "title": "A page"},
            {"type": "file", "url": "data:text/plain,x", "mediaType": "text/plain"},
        ],
    ),
    "steps": (
        [{"type": "start-step"}, "a", {"type": "finish-step"}, {"type": "start-step"}, "b", {"type": "finish-step"}],
        [{"type": "step-start"}, {**TEXT, "text": "a"}, {"type": "step-start"}, {**TEXT, "text": "b"}],
    ),
    "what is no part": (
        [
            None,
            0,
            -1.5,
            True,
            [],
            [[1, [None]], {"a": []}],
            {},
            {"type": "unknown"},
            {"type": 3},
            {"type": None},
            {"data": "[DONE]"},
        ],
        [
            {"type": "data-chunk", "data": data}
            for data in [
                None,
                0,
                -1.5,
                True,
                [],
                [[1, [None]], {"a": []}],
                {},
                {"type": "unknown"},
                {"type": 3},
                {"type": None},
            ]
        ]
        + [{"type": "data-chunk", "data": {"data": "[DONE]"}}],
    ),
    "what has a part's type and not its fields": (
        [
            {"type": "error", "error": {"type": "overloaded_error"}},
            {"type": "file", "path": "a.txt"},
            {"type": "text-delta", "delta": "without an id"},
            {"type": "file", "url": None, "mediaType": 1},
        ],
        [
            {"type": "data-chunk", "data": {"type": "error", "error": {"type": "overloaded_error"}}},
            {"type": "data-chunk", "data": {"type": "file", "path": "a.txt"}},
            {"type": "data-chunk", "data": {"type": "text-delta", "delta": "without an id"}},
            {"type": "data-chunk", "data": {"type": "file", "url": None, "mediaType": 1}},
        ],
    ),
    "empty texts": (["", ""], [{**TEXT, "text": ""}]),
    "a text of a mebibyte": (["x" * MIB], [{**TEXT, "text": "x" * MIB}]),
    "what a frame could be taken for": (
        ["\r\nsay 7\n\n", "[DONE]", "\0\ud7ff"],
        [{**TEXT, "text": "\r\nsay 7\n\n[DONE]\0\ud7ff"}],
    ),
}


@pytest.mark.parametrize("case", PARTS)
async def test_the_ai_sdk_reads_what_a_producer_writes(case: str) -> None:
    chunks, parts = PARTS[case]
    assert await parts_of(*chunks) == parts


async def test_a_result_is_metadata_or_the_last_part_or_nobodys() -> None:
    ends: list[object] = [{"tokens": 3}, {"type": "finish", "finishReason": "stop", "messageMetadata": {"tokens": 3}}]
    ends += [{"type": "message-metadata", "messageMetadata": {"tokens": 3}}, None, "text", 3, [1]]
    messages = [told[-1][1] for told in await read(*(framed("a", end=end) for end in ends))]
    assert [message.get("metadata") for message in messages] == [{"tokens": 3}] * 3 + [None] * 4
    assert {json.dumps(message["parts"]) for message in messages} == {
        json.dumps([{"type": "text", "text": "a", "state": "done"}])
    }


async def test_an_error_is_told_and_an_abort_is_not_one_and_both_are_finished() -> None:
    failed, stopped = await read(framed("a", error=FAILED), framed("a", error=CANCELLED))
    assert [name for name, _ in failed] == ["part"] * 6 + ["error", "message"]
    assert ("error", "no page é") in failed
    assert [name for name, _ in stopped] == ["part"] * 6 + ["message"]
    assert [part["type"] for _, part in stopped[-3:-1]] == ["abort", "finish"]
    assert [told[-1][1]["parts"] for told in (failed, stopped)] == [[{**TEXT, "text": "a"}]] * 2


async def test_whatever_a_producer_writes_is_taken() -> None:
    chance = random.Random(SEED)
    leaves: list[object] = [None, True, 0, -1.5e300, "", "a", "\u2028", "data-x", "type", *sorted(REQUIRED)]

    def value(depth: int = 0) -> object:
        match chance.randrange(4 if depth < 3 else 1):
            case 1:
                return [value(depth + 1) for _ in range(chance.randrange(3))]
            case 2:
                return {str(chance.choice(leaves)): value(depth + 1) for _ in range(chance.randrange(3))}
            case 3:
                return {"type": chance.choice(leaves), chance.choice(KEYS): value(depth + 1)}
            case _:
                return chance.choice(leaves)

    bodies = [framed(*(value() for _ in range(8)), end=value()) for _ in range(200)]
    for body, told in zip(bodies, await read(*bodies), strict=True):
        assert "refused" not in {name for name, _ in told}, body


def test_the_types_of_parts_are_those_of_the_ai_sdk() -> None:
    source = (PACKAGES / "node_modules/ai/dist/index.js").read_text()
    (schema,) = re.findall(r"^const uiMessageChunkSchema = .*?^\]\)\)\);$", source, re.MULTILINE | re.DOTALL)
    known = set(re.findall(r'^\t*(?:z\$1\.looseObject\(\{ )?type: z\$1\.literal\("([^"]+)"\)', schema, re.MULTILINE))
    assert known - {"text"} == set(REQUIRED)  # that one is of a steering message's parts


async def test_nulls_of_models_are_left_out_where_the_schema_refuses_them() -> None:
    part = {"type": "tool-input-available", **TOOL, "input": None, "providerMetadata": None, "dynamic": None, "title": None}
    (told,) = await read(framed(msgspec.Raw(json.dumps(part).encode()), {"type": "start", "messageId": None}))
    assert {name for name, _ in told} == {"part", "message"}
    assert "providerMetadata" not in told[1][1]


async def test_the_answer_of_a_graph_of_langgraphs_that_the_page_shows_is_its_text() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("Nothing is lost")]))

    async def call(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph: Any = StateGraph(MessagesState)
    graph.add_node("model", call)
    graph.add_edge(START, "model")
    page = ROOT / "docs/how-to/ai-sdk.md"
    (program,) = [block for block in blocks(page) if "graph.astream" in block]
    shown: dict[str, Any] = {"graph": graph.compile()}
    exec(compile(program, str(page), "exec", dont_inherit=True), shown)
    question = {"id": "q", "role": "user", "parts": [{"type": "text", "text": "why?"}]}
    assert [text async for text in shown["answer"]([question])] == ["Nothing", " ", "is", " ", "lost"]
