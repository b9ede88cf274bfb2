"""Genkit: the programs that the page shows answer as the page says."""

from typing import TYPE_CHECKING, Any, Final

import anyio
from tests.docs.test_serve import shown_with
from tests.http.agents import Words, ours_app, words_agent
from tests.http.servers import STREAM_ID, STREAMING, frames_of, http_to, serving
from tests.test_docs import ROOT

if TYPE_CHECKING:
    from tests.http.conftest import GenkitClient

PAGE: Final = ROOT / "docs/how-to/genkit.md"


async def test_a_context_provider_lets_in_and_names_and_rejects() -> None:
    ann = {"Authorization": "Bearer t0k3n"}
    async with http_to(shown_with("context_provider=signed_in", page=PAGE)["app"]) as http:
        answer = await http.post("/answer", json={"data": "why"}, headers=STREAMING | ann)
        named = {STREAM_ID: answer.headers[STREAM_ID]}
        rest = await http.post("/answer", headers=ann | named)
        refused = [await http.request(method, "/answer", headers=named) for method in ("POST", "DELETE")]
    assert frames_of(answer.content) == [{"message": "ann asks", "offset": 0}, {"result": "why", "offset": 1}]
    assert rest.content == answer.content
    assert [(each.status_code, each.json()["error"]["message"]) for each in refused] == [(401, "sign in first")] * 2


async def test_an_agent_is_talked_to_and_its_detached_turn_is_read(genkit_client: "GenkitClient") -> None:
    async with serving(shown_with("durable_flow(guide", page=PAGE)["app"]) as url:
        steps = [["send", "Where to?"], ["detach", "And then?"], ["read"], ["wait"], ["snapshot"]]
        lines: list[Any] = await genkit_client("agent", url=f"{url}/guide", steps=steps)
    sent, detached, read, waited, found, _ = [line for line in lines if "chunk" not in line]
    assert sent["text"] == "Where to? "
    assert detached["snapshotId"] == read["output"]["snapshotId"]
    assert [part["text"] for part in read["output"]["message"]["content"]] == ["And ", "then? "]
    assert waited["snapshot"] == found["snapshot"]
    assert (found["snapshot"]["status"], len(found["snapshot"]["state"]["messages"])) == ("completed", 4)
    said = [line["chunk"]["modelChunk"]["content"][0]["text"] for line in lines if "modelChunk" in line.get("chunk", ())]
    assert said == ["Where ", "to? ", "And ", "then? "]


async def test_the_sessions_of_users_are_apart_even_under_one_id() -> None:
    store = shown_with("class SessionsOfUsers", page=PAGE)["SessionsOfUsers"]()
    words = Words()

    def named(request: Any) -> dict[str, str]:
        return {"name": request.headers["x-name"]}

    async with http_to(ours_app(words_agent(words, store), context_provider=named)) as http:

        async def answered(path: str, name: str, **body: object) -> Any:
            return (await http.post(path, json=body, headers={"X-Name": name})).json().get("result")

        asked = {"message": {"role": "user", "content": [{"text": "hello"}]}}
        for name in ("ann", "eve", "ann"):
            assert (await answered("/words", name, data=asked, init={"sessionId": "1"}))["finishReason"] == "stop"
        lookup = {"sessionId": "1"}
        turns = [(await answered("/words/getSnapshot", name, data=lookup))["state"]["custom"] for name in ("ann", "eve")]
        assert turns == [{"turns": 2}, {"turns": 1}]
        assert await answered("/words/getSnapshot", "bob", data=lookup) is None
        held = {"message": {"role": "user", "content": [{"text": "hold"}]}, "detach": True}
        detached = await answered("/words", "ann", data=held, init={})
        assert (await answered("/words/abort", "eve", data=detached["snapshotId"]))["status"] is None
        assert (await answered("/words/abort", "ann", data=detached["snapshotId"]))["status"] == "pending"
        with anyio.fail_after(5):
            await words.aborted.wait()
