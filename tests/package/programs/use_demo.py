"""The demo's app, with its flow and its page, which are in the wheel."""

from importlib.resources import files

from streamkeep.demo import create_app
from streamkeep.http import StreamsHTTP

page = files("streamkeep.demo") / "page"
assert "<html" in (page / "index.html").read_text()
assert {path.name for path in page.iterdir()} >= {"index.html", "demo.js", "style.css", "icon.svg"}
assert callable(create_app(StreamsHTTP("memory://")))
