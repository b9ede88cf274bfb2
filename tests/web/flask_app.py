"""The app of Flask's that servers under test run."""

import os
from typing import Final

from flask import Flask, Response, request
from tests.web.words import CHECK_TOKEN, OPTIONS, connected, words

from streamkeep.http import SSEFraming
from streamkeep.integrations.flask import FlaskStreams

app: Final = Flask(__name__)
streams: Final = FlaskStreams(connected, app, **OPTIONS)
app.register_blueprint(streams.check_blueprint(trust=CHECK_TOKEN), url_prefix="/check")


@app.get("/process")
def process() -> str:
    """Say which process answers."""
    return str(os.getpid())


@app.post("/chat/<chat>")
def ask(chat: str) -> Response:
    """Begin."""
    return streams.respond(words(request.args), key=chat, framing=SSEFraming())


@app.get("/chat/<chat>")
def follow(chat: str) -> Response:
    """Come back."""
    return streams.follow(key=chat)


@app.delete("/chat/<chat>")
def stop(chat: str) -> Response:
    """Stop."""
    return streams.cancel(key=chat)
