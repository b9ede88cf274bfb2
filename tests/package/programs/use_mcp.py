"""A server of MCP's with an event store."""

from mcp.server.mcpserver import MCPServer

from streamkeep.integrations.mcp import StreamEventStore

server = MCPServer("answers")
events = StreamEventStore("sqlite:///streams.db")
assert callable(events.around(server.streamable_http_app(event_store=events, retry_interval=8_000)))
