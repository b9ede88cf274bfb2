"""A durable view of Flask's."""

from flask import Flask

from streamkeep.http import SSEFraming
from streamkeep.integrations.flask import FlaskStreams

app = Flask(__name__)
streams = FlaskStreams("memory://", app)


@app.post("/ask")
def ask():
    return streams.respond(iter(["Nothing", "is", "lost"]), id="answer", framing=SSEFraming())


answer = app.test_client().post("/ask")
assert answer.status_code == 200
assert b'data: "lost"' in answer.data, answer.data
