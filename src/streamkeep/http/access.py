"""Who may start, read, resume and stop which stream. An id is not a permission.

A stream belongs to the route that it was started through and to the owner that `authorize` named then; both are kept in its
metadata. For everybody else it does not exist: the answer is the same as for an unknown id, so that ids cannot be probed.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .._info import StreamInfo
from ..errors import StreamNotFoundError
from .place import query_of

Action = Literal["start", "read", "resume", "stop", "list", "page", "delete"]
REQUEST: Final = "streamkeep.request"
"""Where a scope has the request of a framework that is not ASGI's."""


@dataclass(frozen=True, slots=True)
class Access:
    """What `authorize` is asked about.

    Attributes:
        action: `start` (a new stream), `resume` (a POST with an id), `read` (events or metadata by GET), `stop`,
            `list` (one's own streams). Of an `Inspector` it is `page` (its files, which say nothing of streams), `list` (everybody's
            streams), `read`, `stop` or `delete`.
        scope: the ASGI connection scope.
        headers: the request's headers, names in lower case.
        stream: the stream in question with its metadata; None for `start`, and where there is none under the id asked for.
        context: what the framework's own dependency gave, such as Genkit's action context; empty without one.
        request: the framework's own request, of `FlaskStreams` and `DjangoStreams`: with Django its `user` and `session`. None elsewhere.
    """

    action: Action
    scope: Mapping[str, Any]
    headers: Mapping[str, str]
    stream: StreamInfo | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    request: Any = None

    @property
    def cookies(self) -> Mapping[str, str]:
        """The request's cookies, as browsers send them (RFC 6265, 5.4): what an `EventSource` can carry."""
        pairs = (pair.partition("=") for pair in self.headers.get("cookie", "").split(";"))
        return {name.strip(): value.strip().strip('"') for name, equals, value in pairs if equals}

    @property
    def query(self) -> Mapping[str, str]:
        """The request's query, of repeated names the last: the other thing."""
        return query_of(self.scope)


Authorize = Callable[[Access], "object | Awaitable[object]"]
"""Gives the name of who is asking, or whatever has one as its text, such as a number or a UUID (None: nobody in particular); or raises
`PublicError`, say with PERMISSION_DENIED, or Starlette's or FastAPI's `HTTPException`, to reject the request. Whoever started a stream owns
it: nobody under another name can read, resume or stop it, but who has a token for it."""


async def lets_in(answer: object, whose: str) -> bool:
    """Say whether what an `authorize` has given, awaited if it is to be, lets in: True does, and False does not.

    TypeError: it is anything else. A user's name, say, tells a `StreamsHTTP` whose a stream is, and does not let in everywhere.
    """
    answer = await answer if inspect.isawaitable(answer) else answer
    if not isinstance(answer, bool):
        raise TypeError(f"`authorize` of {whose} gives True or False, not {type(answer).__name__}")
    return answer


async def owner_of(authorize: Authorize | None, access: Access) -> str:
    """Ask who is asking. Raises whatever `authorize` raises, and StreamNotFoundError if the stream is somebody else's."""
    owner = await name_of(authorize, access)
    check_owner(access.stream, owner)
    return owner


async def name_of(authorize: Authorize | None, access: Access) -> str:
    """Ask who is asking, whosever the stream is; empty: nobody in particular. Raises whatever `authorize` raises."""
    answer = authorize(access) if authorize else None
    answer = await answer if inspect.isawaitable(answer) else answer
    return "" if answer is None else owner_text(answer)


def owner_text(owner: object) -> str:
    """Give an owner's text. TypeError: it has none that is somebody's name, such as a bool, bytes, or an object without a text of its own,
    which would be named by an address that another one may have next.
    """
    kind: Any = owner.__class__  # of a proxy, such as Flask-Login's `current_user`, whatever is behind it
    has_no_text = kind is type(None) or (kind.__str__ is object.__str__ and not issubclass(kind, int))
    if has_no_text or issubclass(kind, (bool, bytes, bytearray, memoryview)) or hasattr(owner, "get_secret_value"):
        raise TypeError(f"an owner is a name or an id, not {kind.__name__}; `authorize` gives one, and raises to refuse")
    return str(owner)


def check_owner(stream: StreamInfo | None, owner: str) -> None:
    """Raise StreamNotFoundError if the stream, if there is one, is somebody else's."""
    if stream is not None and stream.owner != owner:
        raise StreamNotFoundError("stream not found")


def check_route(stream: StreamInfo, route: str | None) -> None:
    """Raise StreamNotFoundError if the stream was started through another route; a `route` of None takes all."""
    if route is not None and stream.metadata.get("route", "") != route:
        raise StreamNotFoundError("stream not found")
