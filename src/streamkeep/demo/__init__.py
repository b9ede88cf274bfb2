"""The demo, `streamkeep demo`: a Genkit flow whose long answer outlives reloads, lost connections and killed servers.

`flow` has the model and the flow, `app` serves it with a page. No key and no network are needed. Extra: `streamkeep[demo]`.
"""

from .app import create_app
from .flow import TEXT, answer_flow

__all__ = ["TEXT", "answer_flow", "create_app"]
