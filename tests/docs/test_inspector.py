"""The inspector in an app: who is let in by the program that the page shows."""

from base64 import b64encode

import pytest
from tests.docs.test_serve import shown_with
from tests.http.servers import http_to
from tests.test_docs import ROOT

PAGE = ROOT / "docs/how-to/inspector.md"


def basic(text: str) -> str:
    return "Basic " + b64encode(text.encode()).decode()


async def test_an_operator_is_let_in_by_the_password() -> None:
    shown = shown_with("Inspector(", page=PAGE)
    async with http_to(shown["app"]) as http:
        answer = await http.get("/inspector/", headers={"Authorization": basic(f"operator:{shown['PASSWORD']}")})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "sent", ["", "Basic", "Basic abc", "Basic ???", "Bearer abc", "Basic \xe9", basic("operator:other"), basic("operator:é")]
)
async def test_whatever_else_is_sent_is_a_401_that_asks_for_the_password(sent: str) -> None:
    async with http_to(shown_with("Inspector(", page=PAGE)["app"]) as http:
        answer = await http.get("/inspector/", headers={b"Authorization": sent.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="inspector"'
