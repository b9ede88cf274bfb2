"""The AI SDK's chats over durable streams, with the protocol's own transport for Node."""

import json

import anyio
import httpx
import pytest
from tests.clients.programs import NODE
from tests.durable_streams.clients import BOUND_SECONDS, PACKAGES


@pytest.mark.usefixtures("packages")
async def test_the_ai_sdks_transport_has_the_whole_answer_and_has_it_again(client: httpx.AsyncClient) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        done = await anyio.run_process([NODE, "chat.js", f"{client.base_url}/answer"], cwd=PACKAGES, stderr=None)

    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(len(each["items"]), each["whole"]) for each in said] == [(54, True), (54, True)]
    assert (await client.head("/answer")).headers["stream-closed"] == "true"
