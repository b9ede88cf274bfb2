"""What `docs/how-to/secure.md` says of limits, time-outs and other sites is what the code does."""

import inspect
import re
from collections.abc import Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from tests.hostile.servers import ID, House, house
from tests.hostile.sockets import ask

from streamkeep import InMemoryStreamManager, Limits, StreamManager
from streamkeep._depth import MAX_DEPTH
from streamkeep._manager import MAX_METADATA, checked_id, checked_metadata
from streamkeep.errors import InvalidArgumentError, PublicError
from streamkeep.events import MAX_ERROR_TEXT
from streamkeep.http import Access, Bounds, Runner, StorageHTTP, StreamsHTTP
from streamkeep.http.app import MAX_SKIPPED_BYTES
from streamkeep.http.check import MAX_STREAMS
from streamkeep.http.response import Timeouts
from streamkeep.http.runner import ON_END_SECONDS, SAVE_SECONDS
from streamkeep.storage import PAGE_BYTES

PAGE: Final = Path(__file__).parents[2] / "docs/how-to/secure.md"
CLASSES: Final[Mapping[str, type]] = {
    class_.__name__: class_
    for class_ in (StreamsHTTP, StorageHTTP, StreamManager, InMemoryStreamManager, Runner, Timeouts, Bounds, Limits)
}
UNITS: Final[Mapping[str, Any]] = {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "s": timedelta(seconds=1),
    "min": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "": 1,
}
FIXED: Final = {
    "the body of a request that resumes a stream, which is thrown away": MAX_SKIPPED_BYTES,
    "how deep its JSON may be nested": MAX_DEPTH,
    "characters in an id": 255,
    "what a reader that does not read holds": PAGE_BYTES,
    "metadata of a stream, characters": MAX_METADATA,
    "what is kept of an exception's text": MAX_ERROR_TEXT,
    "and how long it may then take for what it does at its end": timedelta(seconds=SAVE_SECONDS),
    "how long `on_end` may take": timedelta(seconds=ON_END_SECONDS),
    "streams of [checks](check.md) at a time, in one process": MAX_STREAMS,
}


def rows() -> list[list[str]]:
    """Give the cells of the table of limits, without its head."""
    section = PAGE.read_text().partition("## Limits and time-outs\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def value_of(text: str) -> object:
    """Give what `4 MiB`, `30 s`, `1,000` or `none` mean."""
    number, _, unit = text.replace(",", "").partition(" ")
    return None if text == "none" else int(number) * UNITS[unit]


def default_of(place: str) -> object:
    """Give the default of `Class(parameter=)`."""
    found = re.fullmatch(r"`(\w+)\((\w+)=\)`", place)
    assert found is not None, place
    return inspect.signature(CLASSES[found[1]]).parameters[found[2]].default


@pytest.mark.parametrize(("what", "default", "place"), [row[:3] for row in rows()])
def test_each_default_is_the_one_in_the_code(what: str, default: str, place: str) -> None:
    assert value_of(default) == (FIXED[what] if place == "fixed" else default_of(place))


def test_nothing_that_can_be_limited_is_left_out() -> None:
    shown = {place for _, _, place, _ in rows()}
    for class_ in (CLASSES["Timeouts"], CLASSES["Bounds"], CLASSES["Limits"]):
        assert {f"`{class_.__name__}({name}=)`" for name in inspect.signature(class_).parameters} <= shown
    for class_ in (CLASSES["StreamsHTTP"], CLASSES["InMemoryStreamManager"]):
        bounds = [name for name in inspect.signature(class_).parameters if name.startswith("max_")]
        assert {f"`{class_.__name__}({name}=)`" for name in bounds} <= shown
    assert {what for what, _, place, _ in rows() if place == "fixed"} == FIXED.keys()


def test_what_is_fixed_is_so_where_it_counts() -> None:
    checked_id("a" * 255)
    checked_metadata({"a": "b" * (MAX_METADATA - 1)})
    with pytest.raises(InvalidArgumentError):
        checked_id("a" * 256)
    with pytest.raises(InvalidArgumentError):
        checked_metadata({"a": "b" * MAX_METADATA})


# The recipe against other sites


@pytest.fixture
def careful() -> Generator[House]:
    """Give a server that asks as the page says."""
    (recipe,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"Access": Access, "PublicError": PublicError, "name_in": lambda cookie: cookie}
    exec(recipe, names)
    with house("durable_flow", authorize=names["authorize"]) as target:
        yield target


def test_another_site_cannot_start_a_flow_for_somebody_with_a_cookie(careful: House) -> None:
    # What a page of another site can send without asking first: no header of its own, and this type of body.
    forged = (b"Cookie: session=ada", b"Origin: http://evil.example", b"Content-Type: text/plain")
    for site, code in ((b"cross-site", 403), (b"same-site", 403), (b"same-origin", 200), (b"none", 200)):
        for path in (b"/few", b"/few?stream=true"):
            answer = ask(careful.address, "POST", path, *forged, b"Sec-Fetch-Site: " + site, body=b'{"data":0}')
            assert answer.code == code, site
    assert ask(careful.address, "POST", b"/few", body=b'{"data":0}').code == 200  # no browser


def test_no_answer_lets_another_site_read_it(served: House) -> None:
    for method, path in (("GET", b"/streams/known"), ("GET", b"/streams/known/info"), ("POST", b"/few"), ("OPTIONS", b"/few")):
        answer = ask(served.address, method, path, b"Origin: http://evil.example", b"Connection: close", body=b'{"data":0}')
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers


def test_no_browser_takes_a_stream_for_a_page() -> None:
    with house("durable_flow") as target:
        page = b'{"data":"<script>alert(1)</script>"}'
        for fields in ((), (b"Accept: text/html, text/event-stream",)):
            answer = ask(target.address, "POST", b"/echo", *fields, b"Connection: close", body=page)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-type"] in {"application/json", "text/event-stream"}
        refused = (
            ask(target.address, "GET", b"/streams/<script>alert(1)", b"Connection: close"),
            ask(target.address, "POST", b"/few", ID + b"<script>alert(1)</script>", b"Connection: close", body=b""),
        )
        for answer in refused:
            assert (answer.code, answer.headers["content-type"]) == (400, "application/json")
            assert b"script" not in answer.body
