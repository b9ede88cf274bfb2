"""Testing an app: what the page says beside its files, which are run as they are."""

from typing import Any, Final

from tests.http.servers import STREAM_ID, http_to
from tests.test_docs import ROOT, named_files

PAGE: Final = ROOT / "docs/how-to/testing.md"


async def test_memory_forgets_its_streams_when_the_app_stops() -> None:
    shown: dict[str, Any] = {}
    exec(compile(named_files(PAGE)["chat.py"], str(PAGE), "exec", dont_inherit=True), shown)
    async with http_to(shown["app"]) as http:
        stream = (await http.post("/ask", params={"question": "Nothing is lost"})).headers[STREAM_ID]
        before = await http.get(f"/streams/{stream}")
    async with http_to(shown["app"]) as http:
        after = await http.get(f"/streams/{stream}")
    assert (before.status_code, after.status_code) == (200, 404)
