"""A service that answers, of which any number of instances share one storage: each may be restarted while it answers."""

import os
from datetime import timedelta

import anyio
from fastapi import FastAPI, Request, Response

from streamkeep import StorageError, StreamInput
from streamkeep.http import CheckHTTP, SSEFraming, StreamsHTTP, Timeouts

DRAIN = timedelta(seconds=float(os.environ.get("DRAIN_SECONDS", "20")))
HEARTBEAT = timedelta(seconds=float(os.environ.get("HEARTBEAT_SECONDS", "15")))
WORDS_PER_SECOND = float(os.environ.get("WORDS_PER_SECOND", "20"))

streams_http = StreamsHTTP(os.environ["STREAMS_URL"], drain=DRAIN, timeouts=Timeouts(heartbeat=HEARTBEAT))
app = FastAPI(lifespan=streams_http.lifespan)
if check_token := os.environ.get("STREAMKEEP_CHECK_TOKEN"):  # for `streamkeep check`; off unless it is set
    app.mount("/check", CheckHTTP(streams_http, trust=check_token))


@streams_http.recoverable("answer")
async def answer(stream: StreamInput, question: str) -> None:
    """Answer, or go on where another instance had to leave off; in place of the loop, your model."""
    for number, word in enumerate(question.split()[stream.checkpoint or 0 :], (stream.checkpoint or 0) + 1):
        await anyio.sleep(1 / WORDS_PER_SECOND)
        await stream.write({"text": word}, checkpoint=number)


@app.post("/chat/{chat}")
async def ask(request: Request, chat: str, question: str) -> Response:
    """Start an answer, or show the one that runs."""
    return named(await streams_http.respond(request, answer(question=question), key=chat, framing=SSEFraming()))


@app.get("/chat/{chat}/stream")
async def follow(request: Request, chat: str) -> Response:
    """Show the answer to who comes back."""
    return named(await streams_http.follow(request, key=chat))


@app.delete("/chat/{chat}")
async def stop(request: Request, chat: str) -> Response:
    """Stop it, in whatever instance it runs."""
    return await streams_http.cancel(request, key=chat)


@app.get("/livez")
async def live() -> dict[str, str]:
    """Say that the process works: whoever does not get this answer starts it anew."""
    return {"status": "ok"}


@app.get("/readyz")
async def ready(response: Response) -> dict[str, str]:
    """Say whether the storage answers, too: whoever gets 503 sends requests to another instance for now."""
    try:
        with anyio.fail_after(2):
            await streams_http.streams.list(limit=1)
    except (StorageError, TimeoutError):
        response.status_code = 503
        return {"status": "the storage does not answer"}
    return {"status": "ok"}


def named(response: Response) -> Response:
    """Have an answer say which instance gives it, to see how requests are spread."""
    response.headers["X-Instance"] = os.environ.get("INSTANCE", "")
    return response
