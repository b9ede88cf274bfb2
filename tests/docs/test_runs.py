"""How a run has ended: the page's program saves the ends of all runs, also of those whose process was killed."""

import re
import sqlite3
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from tests.http.servers import STREAM_ID, http_to
from tests.test_docs import ROOT, blocks

from streamkeep import StreamInfo, StreamManager

PAGE: Final = ROOT / "docs/how-to/runs.md"
(SHOWN,) = [block for block in blocks(PAGE) if "save_what_was_missed" in block]
PROGRAM: Final = (
    SHOWN.replace(
        "ttl=timedelta(days=1)", "lease=timedelta(seconds=1), grace=timedelta(seconds=0.5), ttl=timedelta(days=1)"
    ).replace("anyio.sleep(10)", "anyio.sleep(0.2)")  # how often it looks
)
KILLED: Final = """
import anyio, httpx
from shown import app, lifespan

async def main():
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/ask", params={"question": "Nothing is lost " * 1000})

anyio.run(main)
"""


def rows(db: sqlite3.Connection) -> dict[str, tuple[str | None, str | None]]:
    return {stream: (status, text) for stream, status, text in db.execute("SELECT stream, status, text FROM runs")}


async def killed_in_mid_answer(directory: Path) -> str:
    """Run the program in a process, kill that when its answer has begun, and give the stream's id."""
    (directory / "shown.py").write_text(PROGRAM)
    async with await anyio.open_process([sys.executable, "-c", KILLED], cwd=directory) as process:
        db = sqlite3.connect(directory / "runs.db")
        while not (found := _noted(db)):  # noqa: ASYNC110 - another process does it
            await anyio.sleep(0.05)
        db.close()
        async with StreamManager.connect(f"sqlite:///{directory}/streams.db") as streams:
            while not any(info.tail for info in await streams.list()):  # noqa: ASYNC110 - another process does it
                await anyio.sleep(0.05)
        process.kill()
    return found[0]


def _noted(db: sqlite3.Connection) -> list[str]:
    try:
        return list(rows(db))
    except sqlite3.OperationalError:  # the table is not there yet
        return []


@pytest.mark.timeout(120)
async def test_the_end_of_each_run_is_saved_also_if_its_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with anyio.fail_after(60):
        killed = await killed_in_mid_answer(tmp_path)
    shown: dict[str, Any] = {}
    exec(compile(PROGRAM, str(PAGE), "exec", dont_inherit=True), shown)
    db: sqlite3.Connection = shown["db"]
    before = rows(db)
    db.execute("INSERT INTO runs (stream, noted) VALUES ('old', ?), ('young', ?)", (time.time() - 100, time.time() + 100))
    with anyio.fail_after(60):
        async with http_to(shown["app"]) as http:
            answer = await http.post("/ask", params={"question": "All is well"})
            ended = answer.headers[STREAM_ID]
            while None in (rows(db)[killed][0], rows(db)[ended][0]):  # noqa: ASYNC110 - no event tells
                await anyio.sleep(0.05)
    found = rows(db)
    db.close()
    assert before == {killed: (None, None)}
    assert set(found) == {killed, ended, "young"}
    assert found[ended] == ("done", "Alliswell")
    status, text = found[killed]
    assert (status, (text or "").startswith("Nothing")) == ("ABORTED", True)


def test_the_page_names_every_field_of_what_is_known_of_a_stream() -> None:
    table = PAGE.read_text().partition("| field | is |\n")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert named == [field.name for field in fields(StreamInfo)]
