"""A durable endpoint of FastAPI's."""

import asyncio

from fastapi import FastAPI, Request

from streamkeep.http import SSEFraming, StreamsHTTP

streams_http = StreamsHTTP("sqlite:///streams.db")
app = FastAPI(lifespan=streams_http.lifespan)


async def words(question):
    for word in question.split():
        yield word


@app.post("/ask")
async def ask(request: Request, question: str):
    return await streams_http.respond(request, words(question), id="answer", framing=SSEFraming())


async def main():
    body = b""

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        nonlocal body
        assert message.get("status", 200) == 200, message
        body += message.get("body", b"")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/ask",
        "root_path": "",
        "query_string": b"question=Nothing+is+lost",
        "headers": [],
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert b'data: "lost"' in body, body


asyncio.run(main())
