"""A Genkit flow behind FastAPI."""

import asyncio

from fastapi import FastAPI
from genkit import ActionRunContext, Genkit

from streamkeep.integrations.fastapi import durable_flow

ai = Genkit()


@ai.flow()
async def answer(question: str, ctx: ActionRunContext) -> str:
    for word in question.split():
        ctx.send_chunk(word)
    return question


app = FastAPI()
app.include_router(durable_flow(answer, "sqlite:///streams.db"))


async def main():
    body = b""
    asked = [{"type": "http.request", "body": b'{"data": "Nothing is lost"}', "more_body": False}]

    async def receive():
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message):
        nonlocal body
        assert message.get("status", 200) == 200, message
        body += message.get("body", b"")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/answer",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")],
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert b'data: {"result": "Nothing is lost"' in body or b'"result":"Nothing is lost"' in body, body


asyncio.run(main())
