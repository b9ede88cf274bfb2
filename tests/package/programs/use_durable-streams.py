"""A server of the Durable Streams protocol, with subscriptions."""

import asyncio

from streamkeep.durable_streams import durable_streams

app = durable_streams("sqlite:///streams.db", subscriptions="local")


async def ask(method, path, body=b"", **headers):
    answer = {"body": b""}

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            answer["status"] = message["status"]
        else:
            answer["body"] += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            *((name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return answer["status"], answer["body"]


async def main():
    async with app:
        assert (await ask("PUT", "/answer", content_type="application/json"))[0] == 201
        assert (await ask("POST", "/answer", b'{"text": "Nothing is lost"}', content_type="application/json"))[0] == 204
        status, body = await ask("GET", "/answer")
        assert (status, b"Nothing is lost" in body) == (200, True), body
        status, body = await ask("GET", "/__ds/jwks.json")
        assert (status, b"Ed25519" in body) == (200, True), body


asyncio.run(main())
