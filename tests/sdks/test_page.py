"""The page about SDKs: each program on it is run, and what it says of sizes is measured."""

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
import pytest
from tests.sdks.provider import WORDS, Provider
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.slow  # it imports all of them

PAGE: Final = ROOT / "docs/how-to/sdks.md"
APP, *ANSWERS = [block for block in blocks(PAGE) if "chunk_type" not in block and "langgraph_node" not in block]
ASK: Final = """
import asyncio
import json
from importlib import import_module

import httpx


async def main():  # in one event loop: some SDKs keep their clients
    for name in ("app", "plain_app"):
        app = import_module(name).app
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answer = await client.post("/ask", params={"question": "why?"}, timeout=40)
            print(json.dumps(answer.text.splitlines()))


asyncio.run(main())
"""
PLAIN: Final = {
    "chunks(stream)": "stream",
    "chunks(Runner.run_streamed(agent, question))": "Runner.run_streamed(agent, question).stream_events()",
    "return chunks(await": "return (await",
    "chunks(agent.run_stream_events(question))": "agent.run_stream_events(question)",
}
"""What helps is replaced by what would be written without it."""
NAMES: Final = [
    *("OpenAI, chat completions", "OpenAI, Responses", "Anthropic", "Anthropic .stream()", "Gemini", "LiteLLM", "Pydantic AI"),
    *("OpenAI's Agents SDK", "LangChain", "LangGraph"),
]
CASES: Final = list(zip(NAMES, ANSWERS, strict=True))


async def answered(block: str, provider: Provider, directory: Path) -> list[list[Any]]:
    """Run the app of the page around one of its answers, and without what helps; give the chunks that a client gets of each."""
    plain = block
    for helped, alone in PLAIN.items():
        plain = plain.replace(helped, alone)
    plain_app = (
        APP.replace("exclude_none=True", "").replace("from answers", "from plain_answers").replace("streams.db", "plain.db")
    )
    for name, text in {"answers": block, "app": APP, "plain_answers": plain, "plain_app": plain_app}.items():
        (directory / f"{name}.py").write_text(text)
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    environment = {**os.environ, **provider.environment(), **quiet}
    pipe = asyncio.subprocess.PIPE
    with anyio.fail_after(50):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASK, cwd=directory, env=environment, stdout=pipe, stderr=pipe
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [chunks_in(msgspec.json.decode(lines), err) for lines in out.splitlines() if lines.startswith(b"[")]


def chunks_in(lines: list[str], err: bytes) -> list[Any]:
    frames = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert "result" in frames[-1], (frames[-1], err.decode())
    return [frame["message"] for frame in frames[:-1]]


def size_of(chunks: list[Any]) -> int:
    return sum(len(msgspec.json.encode(chunk)) for chunk in chunks)


def sizes_on_the_page() -> list[tuple[int, int]]:
    rows = re.findall(r"^\|.*\| ([\d,]+) B \| ([\d,]+) B \|$", PAGE.read_text(), re.MULTILINE)
    return [(int(plain.replace(",", "")), int(here.replace(",", ""))) for plain, here in rows]


@pytest.mark.parametrize(("name", "block"), CASES, ids=NAMES)
async def test_a_program_of_the_page_answers_without_its_instructions_in_the_size_that_it_says(
    name: str, block: str, provider: Provider, tmp_path: Path
) -> None:
    here, plain = await answered(block, provider, tmp_path)
    text = msgspec.json.encode(here).decode()
    assert all(word.strip() in text for word in WORDS)
    assert "Be brief" not in text
    assert "Be brief" in msgspec.json.encode(provider.asked).decode()
    said = sizes_on_the_page()[NAMES.index(name)]
    assert [size_of(plain), size_of(here)] == [pytest.approx(size, rel=0.03) for size in said]
