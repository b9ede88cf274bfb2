"""MCP's own server inside DurableStreaming, asked by MCP's own client: its answers are event streams, too, and none of ours."""

import anyio
import pytest
from mcp.client.client import Client
from mcp.server.mcpserver import Context, MCPServer
from tests.http.servers import STREAM_ID, serving

from streamkeep import InMemoryStreamManager
from streamkeep.http import DurableStreaming
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send


def server_app() -> ASGIApp:
    """Give the streamable HTTP app of a server with one tool. (It can be run once.)"""
    server = MCPServer("counting")

    @server.tool()
    async def count(to: int, ctx: Context) -> str:
        for number in range(to):
            await ctx.report_progress(number, to)
        return "counted"

    return server.streamable_http_app()


class Recording:
    """An app, and what it answers POSTs with, one after the other."""

    def __init__(self, app: ASGIApp) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        head: Message = {}
        body = bytearray()

        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
            body.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, recorded)
        headers = {name.decode().lower(): text.decode() for name, text in head["headers"]}
        self.answers.append((head["status"], headers, bytes(body)))

    @property
    def plain(self) -> list[tuple[int, dict[str, str], bytes]]:
        """The answers, with all sessions called the same."""
        return [
            (status, {name: "" if name == "mcp-session-id" else text for name, text in headers.items()}, body)
            for status, headers, body in self.answers
        ]


async def session(app: ASGIApp, mode: str) -> Recording:
    """Have the client initialize, list the tools, and call one that reports its progress."""
    recording = Recording(app)
    numbers: list[float] = []

    async def reported(progress: float, total: float | None, message: str | None) -> None:
        numbers.append(progress)

    async with serving(recording) as url:
        with anyio.fail_after(20):
            async with Client(f"{url}/mcp", mode=mode) as client:
                assert [tool.name for tool in (await client.list_tools()).tools] == ["count"]
                result = await client.call_tool("count", {"to": 3}, progress_callback=reported)
    assert result.structured_content == {"result": "counted"}
    assert numbers == [0, 1, 2]
    return recording


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_client_of_mcp_is_answered_as_without_us_and_leaves_no_stream(mode: str) -> None:
    streams = InMemoryStreamManager()
    bare = await session(server_app(), mode)
    async with streams:
        inside = await session(DurableStreaming(server_app(), streams), mode)
        kept = await streams.list()
    assert inside.plain == bare.plain
    assert any(headers["content-type"] == "text/event-stream" and b"progress" in body for _, headers, body in inside.answers)
    assert not any(STREAM_ID.lower() in headers for _, headers, _ in inside.answers)
    assert list(kept) == []
