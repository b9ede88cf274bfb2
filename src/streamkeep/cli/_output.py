"""What the commands print: tables and sentences for people, or one JSON object a line for machines."""

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .._copy import Copied, Outcome
from .._info import StreamInfo
from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json

STATUS_STYLES: Final = {"open": "cyan", "done": "green", "error": "red", "unreadable": "red"}
COLUMNS: Final = ("stream", "status", ">events", ">age", ">last written", ">expires", "owner", "key")
WIDE: Final = 10_000
TOKEN_SCHEMES: Final = frozenset(("http", "https", "nats", "tls"))
"""Where nobody looks, no line is folded: what reads it splits at line ends."""

_SECRETLY_ACTIVE: Final = re.compile(r"[^\n -~]")


class CommandError(Exception):
    """Why a command cannot do what was asked, in a sentence; and what it exits with."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


class Output:
    """Prints to stdout.

    Args:
        json: for machines.
    """

    def __init__(self, *, json: bool = False) -> None:
        self._json = json
        self._console = _Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False, emoji=False)
        self._widths = [0] * len(COLUMNS)  # of the table so far; 0: nothing is printed of it
        self.has_streams = False
        """Whether any stream was printed."""

    def streams(self, page: Sequence[StreamInfo]) -> None:
        """Print some streams, at once: the next lines of one table."""
        self.has_streams = self.has_streams or len(page) > 0
        if self._json:
            for stream in page:
                self._print_json(asdict(stream))
        elif rows := [_row(stream, time.time()) for stream in page]:
            self._print_rows(rows)

    def end_of_streams(self) -> None:
        """Say so if there were none."""
        if not self._json and not self.has_streams:
            self._console.print("no streams")

    def _print_rows(self, rows: Sequence[Sequence[str | Text]]) -> None:
        """Print rows under those that are printed already, whose columns they keep where they fit into them."""
        header = [] if any(self._widths) else [[Text(name.lstrip(">"), "dim") for name in COLUMNS]]
        self._widths = [max(widths) for widths in zip(self._widths, *map(_widths, (COLUMNS, *rows)), strict=True)]
        lines = [_line(row, self._widths) for row in (*header, *rows)]
        self._console.print(Text("\n").join(lines), soft_wrap=True)
        sys.stdout.flush()

    def info(self, stream: StreamInfo) -> None:
        """Print what is known of a stream."""
        if self._json:
            self._print_json(asdict(stream))
            return
        table = _table("", "")
        table.show_header = False
        for name, value in _facts(stream, time.time()):
            table.add_row(Text(name, "dim"), value)
        self._console.print(table)

    def event(self, event: StreamEvent[Any]) -> None:
        """Print an event, at once."""
        if self._json:
            self._print_json({"offset": event.offset, "type": event.type.value, **_content(event)})
            return
        line = Text(f"{event.offset:>6}  ", "dim")
        line.append(f"{event.type.value:<5}  ", STATUS_STYLES.get(event.type.value, "dim"))
        line.append(_sentence(event))
        self._console.print(line, soft_wrap=True)
        sys.stdout.flush()

    def outcome(self, stream: str, facts: Mapping[str, object], words: str) -> None:
        """Print what was done with a stream."""
        if self._json:
            self._print_json({"id": stream, **facts})
        else:
            self._console.print(f"{stream}: {words}", soft_wrap=True)

    def copied(self, copied: Copied) -> None:
        """Print what became of a stream that is copied; for people only if it is not whole."""
        if self._json:
            self._print_json(asdict(copied))
        elif not copied.is_whole:
            self._console.print(f"{copied.id}: {copied.outcome}: {printable(copied.why)}", soft_wrap=True)

    def copied_all(self, counts: Mapping[Outcome, int], events: int) -> None:
        """Print what a copy came to."""
        if self._json:
            self._print_json({"events": events, **{outcome.value: counts.get(outcome, 0) for outcome in Outcome}})
        else:
            self._console.print(_sum(counts, events), soft_wrap=True)

    def report(self, facts: Mapping[str, object], lines: Iterable[str]) -> None:
        """Print what a check has found: all of it as JSON, or lines."""
        if self._json:
            self._print_json(facts)
        else:
            self._lines(*lines)

    def welcome_to_demo(self, url: str, storage: str, pid: int) -> None:
        """Say where the demo is, and what to try."""
        self._welcome("streamkeep demo", url, storage)
        tail = [] if urlsplit(storage).scheme == "memory" else [f"  {_command()} tail ID --storage {storage}"]
        self._lines(
            "Ask there, and while the answer comes: reload the page, open it in a second window, cut the connection,",
            f"press stop - or kill this server (kill -9 {pid}) and start it again: the page says what became of the answer.",
            "",
            "In another terminal, with the stream's id from the page:",
            *tail,
            f"  curl -N {url}/streams/ID",
            "",
            "Ctrl-C stops.",
        )

    def welcome_to_serve(self, url: str, storage: str, protocol_root: str | None = None) -> None:
        """Say where the streams are, and those of the Durable Streams protocol, if they are served."""
        self._welcome("streamkeep", url, storage)
        self._lines(
            f"  curl -N {url}/streams/ID              a stream's events as SSE; ?after=N to go on",
            f"  curl {url}/streams/ID/info            what is known of it",
            f"  curl -X DELETE {url}/streams/ID       stop it",
            *(
                []
                if protocol_root is None
                else [f"  {url}{protocol_root}/PATH            a stream of the Durable Streams protocol"]
            ),
            "",
            "Whoever has an id may do that. Ctrl-C stops.",
        )

    def welcome_to_inspector(self, page: str, storage: str, *, read_only: bool) -> None:
        """Say where the inspector's page is."""
        self._welcome("streamkeep inspector", page, storage)
        may = "sees all streams." if read_only else "sees all streams, and may stop and delete them."
        self._lines(f"Whoever has this URL {may} Ctrl-C stops.")

    def _welcome(self, name: str, url: str, storage: str) -> None:
        self._console.print(Text.assemble((name, "bold"), " is at ", (url, "bold cyan underline")), soft_wrap=True)
        self._console.print(f"Streams are kept in {storage}\n", soft_wrap=True)

    def _lines(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, soft_wrap=True)
        sys.stdout.flush()

    def _print_json(self, value: object) -> None:
        sys.stdout.write(encode_json(value).decode() + "\n")
        sys.stdout.flush()


class Copying:
    """Shows how a copy goes on, on stderr, if that is a terminal; leaving it prints what it came to, unless an error leaves it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._counts: Counter[Outcome] = Counter()
        self._events = 0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("")

    @property
    def is_whole(self) -> bool:
        """Whether all streams so far are whole at the target."""
        return not self._counts.keys() - {Outcome.COPIED, Outcome.THERE}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if exc is None:
            self._output.copied_all(self._counts, self._events)

    def progress(self, events: int) -> None:
        """So many events more are copied."""
        self._events += events
        self._bar.update(self._task, description=f"{self._counts.total():,} streams, {self._events:,} events")

    def report(self, copied: Copied) -> None:
        """Print what became of a stream."""
        self._counts[copied.outcome] += 1
        self._output.copied(copied)
        self.progress(0)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit here; what that means is decided in one place


def complain(sentence: str) -> None:
    """Print to stderr why it did not work."""
    sys.stderr.write(f"streamkeep: {printable(sentence)}\n")


def printable(text: str) -> str:
    """Give text that a terminal shows and does not obey: whatever is not printable becomes an escape sequence."""
    return _SECRETLY_ACTIVE.sub(lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1], text)


def _in_a_line(text: str) -> str:
    """Give it for a table in which a line is a stream."""
    return printable(text).replace("\n", "\\n")


def shown_url(storage: str) -> str:
    """Give a storage's URL without its password, or its token: a user who needs none is one there."""
    parts = urlsplit(storage)
    if parts.password:
        return storage.replace(f":{parts.password}@", ":***@")
    return storage.replace(f"{parts.username}@", "***@") if parts.username and parts.scheme in TOKEN_SCHEMES else storage


def ago(seconds: float) -> str:
    """Give a span of time in words, to one unit."""
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def _command() -> str:
    """Give what to type for this command where it was called: it need not be on PATH."""
    return "streamkeep" if shutil.which("streamkeep") else os.path.relpath(sys.argv[0])


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def _widths(row: Sequence[str | Text]) -> Sequence[int]:
    return [cell_len(str(cell).lstrip(">")) for cell in row]


def _line(row: Sequence[str | Text], widths: Sequence[int]) -> Text:
    """Give a row in columns. (A table of rich's takes a second for a thousand.)"""
    line = Text()
    for cell, name, width in zip(row, COLUMNS, widths, strict=True):
        pad = " " * (width - cell_len(str(cell)))
        line.append(pad if name.startswith(">") else "").append(cell).append("  " if name.startswith(">") else pad + "  ")
    line.rstrip()
    return line


def _row(stream: StreamInfo, now: float) -> list[str | Text]:
    return [
        stream.id,
        _status(stream),
        str(stream.tail),
        ago(now - stream.created_at),
        f"{ago(now - stream.updated_at)} ago",
        "" if stream.status == "open" else f"in {ago(stream.expires_at - now)}",
        _in_a_line(stream.owner),
        _in_a_line(stream.key),
    ]


def _facts(stream: StreamInfo, now: float) -> Iterable[tuple[str, str | Text]]:
    """Give what is known, by name. Metadata come last, under whatever names they have: they take the place of nothing."""
    yield "stream", stream.id
    yield "status", _status(stream)
    yield "events", str(stream.tail)
    yield "opened", f"{_moment(stream.created_at)}, {ago(now - stream.created_at)} ago"
    yield "last written", f"{_moment(stream.updated_at)}, {ago(now - stream.updated_at)} ago"
    if stream.status == "open":
        yield "writer", f"session {stream.session}" if stream.session else "none: it was released, and another may go on"
    else:
        yield "expires", f"{_moment(stream.expires_at)}, in {ago(stream.expires_at - now)}"
    facts = {"owner": stream.owner, "key": stream.key}
    metadata = {name: value for name, value in stream.metadata.items() if name != "owner"}
    for name, value in (*facts.items(), *metadata.items()):
        if value:
            yield printable(name), printable(value)


def _status(stream: StreamInfo) -> Text:
    return Text(" ".join(filter(None, (stream.status, stream.error))), STATUS_STYLES[stream.status])


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _sum(counts: Mapping[Outcome, int], events: int) -> str:
    parts = [f"{counts.get(Outcome.COPIED, 0):,} streams copied ({events:,} events)"]
    for outcome, words in (
        (Outcome.THERE, "there already"),
        (Outcome.WRITING, "still being written"),
        (Outcome.REFUSED, "refused"),
        (Outcome.MISSING, "missing"),
    ):
        if count := counts.get(outcome):
            parts.append(f"{count:,} {words}")
    return ", ".join(parts)


def _content(event: StreamEvent[Any]) -> Mapping[str, object]:
    match event.type:
        case StreamEventType.CHUNK:
            return {"chunk": event.chunk}
        case StreamEventType.DONE:
            return {"output": event.output}
        case StreamEventType.ERROR:
            return {"error": asdict(event.error)}
        case StreamEventType.RECOVERING:
            return {"attempt": event.attempt}
        case StreamEventType.RESTARTED:
            return {}


def _sentence(event: StreamEvent[Any]) -> str:
    if event.type is not StreamEventType.ERROR:
        return printable(event.data.decode())
    return _in_words(event.error)


def _in_words(error: ErrorInfo) -> str:
    words = f"{error.status}: {error.message}"
    return printable(f"{words}\n{error.internal.rstrip()}" if error.internal else words)
