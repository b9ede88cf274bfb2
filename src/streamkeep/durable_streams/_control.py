"""The control API of subscriptions, under the reserved prefix `__ds` (6, 7): requests read, and answers made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, TypeVar

import msgspec

from . import _paths
from ._requests import RefusedError
from ._subscriptions import Subscriptions, linked
from ._wakes import MAX_EXPLICIT, MAX_SEGMENTS, Config, Refusal, Subscription
from ._webhooks import Signer, WebhookRejectedError, check_url

T = TypeVar("T")

MIN_LEASE_MS: Final = 1_000
MAX_LEASE_MS: Final = 600_000
MAX_NAME: Final = 256
MAX_TEXT: Final = 1_024


class Webhook(msgspec.Struct):
    """Where a webhook goes."""

    url: str


class Asked(msgspec.Struct):
    """The body of a PUT."""

    type: str
    pattern: str | None = None
    streams: list[str] | None = None
    webhook: Webhook | None = None
    wake_stream: str | None = None
    lease_ttl_ms: int | None = None
    description: str | None = None


class AskedStreams(msgspec.Struct):
    """The body of a POST to `streams`."""

    streams: list[str]


class AskedClaim(msgspec.Struct):
    """The body of a claim."""

    worker: str


class Ack(msgspec.Struct):
    """How far one stream is processed."""

    offset: str
    stream: str = ""
    path: str = ""


class AskedAck(msgspec.Struct):
    """The body of a callback, an ack or a release."""

    wake_id: str
    generation: int
    acks: list[Ack] = []
    done: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status, and JSON, if it has a body."""

    code: int
    value: object = None


def reply_of(refusal: Refusal) -> Reply:
    """Give the answer that says why a request is not done."""
    error: dict[str, object] = {"code": refusal.name, "message": refusal.reason, **(refusal.details or {})}
    return Reply(refusal.code, {"error": error})


def refused(reason: str, name: str = "INVALID_REQUEST") -> RefusedError:
    """Give what refuses a request that can never be right."""
    return RefusedError(400, reason, name=name)


def config_of(body: bytes, *, allow_local: bool) -> Config:
    """Read what a PUT asks for. Raises RefusedError."""
    asked = _decoded(body, Asked)
    streams = tuple(sorted({checked_path(path) for path in asked.streams or ()}))
    pattern = _checked_pattern(asked.pattern or "")
    if not pattern and not streams:
        raise refused("there is neither a pattern nor a stream")
    if len(streams) > MAX_EXPLICIT:
        raise refused(f"there are more than {MAX_EXPLICIT} streams")
    lease = 30_000 if asked.lease_ttl_ms is None else asked.lease_ttl_ms
    if not MIN_LEASE_MS <= lease <= MAX_LEASE_MS:
        raise refused(f"lease_ttl_ms is between {MIN_LEASE_MS} and {MAX_LEASE_MS}")
    description = asked.description or ""
    if len(description) > MAX_TEXT:
        raise refused(f"a description has at most {MAX_TEXT} characters")
    match asked.type:
        case "webhook" if asked.webhook is not None:
            try:
                check_url(asked.webhook.url, allow_local=allow_local)
            except WebhookRejectedError as error:
                raise refused(str(error), "WEBHOOK_URL_REJECTED") from None
            return Config("webhook", pattern, streams, asked.webhook.url, "", lease, description)
        case "pull-wake" if asked.wake_stream:
            return Config("pull-wake", pattern, streams, "", checked_path(asked.wake_stream), lease, description)
        case "webhook" | "pull-wake":
            raise refused("webhook needs webhook.url, pull-wake needs wake_stream")
        case _:
            raise refused("type is webhook or pull-wake")


def streams_in(request: "Request", *, allow_local: bool) -> Sequence[tuple[Literal["subscribe", "append"], str]]:
    """Give what else a request about a subscription needs permission for. Raises RefusedError."""
    match request.method, request.what:
        case "PUT", "":
            config = config_of(request.body, allow_local=allow_local)
            needed: list[tuple[Literal["subscribe", "append"], str]] = [
                ("subscribe", path) for path in (config.pattern, *config.streams) if path
            ]
            return [*needed, ("append", config.wake_stream)] if config.wake_stream else needed
        case "POST", "streams":
            return [("subscribe", checked_path(path)) for path in _decoded(request.body, AskedStreams).streams]
        case _:
            return ()


def checked_path(path: str) -> str:
    """Give a path of a stream. RefusedError: it can be none."""
    path = path.removeprefix("/")
    why = _paths.why_refused(path)
    if why is not None or path.split("/")[0] == _paths.CONTROL:
        raise refused(why or "the path is reserved")
    return path


def _checked_pattern(pattern: str) -> str:
    pattern = pattern.removeprefix("/")
    if pattern and (_paths.why_refused(pattern) is not None or pattern.count("/") >= MAX_SEGMENTS):
        raise refused("the pattern is malformed, or too long")
    return pattern


def checked_name(name: str) -> str:
    """Give the id of a subscription. RefusedError: it can be none."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or "\ufffd" in name:
        raise refused(f"a subscription's id has 1 to {MAX_NAME} printable characters")
    return name


@dataclass(frozen=True, slots=True)
class Request:
    """A request below `__ds/subscriptions/`: of which subscription, and what of it."""

    method: str
    name: str
    what: str
    """`streams`, `claim`, …; empty: the subscription itself."""
    linked_path: str
    headers: Mapping[str, str]
    base_url: str
    body: bytes = b""


def request_of(method: str, path: str, headers: Mapping[str, str], base_url: str) -> Request:
    """Read which subscription a request is of; `path` is what follows `__ds/subscriptions/`. Raises RefusedError."""
    name, _, rest = path.partition("/")
    what, _, linked_path = rest.partition("/")
    return Request(method, checked_name(name), what, linked_path, headers, base_url)


async def answer(subscriptions: Subscriptions, request: Request, *, allow_local: bool) -> Reply:
    """Answer a request about a subscription. Raises RefusedError, StorageError."""
    match request.what:
        case "":
            return await _answer_base(subscriptions, request, allow_local=allow_local)
        case "streams":
            return await _answer_streams(subscriptions, request)
        case "claim" | "ack" | "callback" | "release" if request.method == "POST" and not request.linked_path:
            return await _answer_worker(subscriptions, request)
        case _:
            raise RefusedError(404, "there is no such thing")


async def _answer_base(subscriptions: Subscriptions, request: Request, *, allow_local: bool) -> Reply:
    name, base_url = request.name, request.base_url
    match request.method:
        case "PUT":
            config = config_of(request.body, allow_local=allow_local)
            code, there = await subscriptions.create(name, config, base_url)
        case "GET":
            code, there = 200, await subscriptions.get(name)
        case "DELETE":
            await subscriptions.delete(name)
            return Reply(204)
        case _:
            raise RefusedError(405, "a subscription is made, read and deleted", headers=(("allow", "GET, PUT, DELETE"),))
    return reply_of(there) if isinstance(there, Refusal) else Reply(code, shown(there, await subscriptions.signer(), base_url))


async def _answer_streams(subscriptions: Subscriptions, request: Request) -> Reply:
    if request.method == "POST" and not request.linked_path:
        paths = [checked_path(path) for path in _decoded(request.body, AskedStreams).streams]
        if not 1 <= len(paths) <= MAX_EXPLICIT:
            raise refused(f"there are 1 to {MAX_EXPLICIT} streams")
        return _done(await subscriptions.add(request.name, paths))
    if request.method == "DELETE" and request.linked_path:
        return _done(await subscriptions.remove(request.name, request.linked_path))
    raise RefusedError(405, "streams are added by POST, and removed one by one")


async def _answer_worker(subscriptions: Subscriptions, request: Request) -> Reply:
    name = request.name
    if request.what == "claim":
        worker = _decoded(request.body, AskedClaim).worker
        if not 1 <= len(worker) <= MAX_NAME:
            raise refused(f"a worker's name has 1 to {MAX_NAME} characters")
        return _claimed(await subscriptions.claim(name, worker))
    token, asked = _bearer(request.headers), _decoded(request.body, AskedAck)
    if request.what == "release":
        return _done(await subscriptions.release(name, token, asked.wake_id, asked.generation))
    acks = {ack.stream or ack.path: ack.offset for ack in asked.acks}
    kind = "claim" if request.what == "ack" else "callback"
    acked = await subscriptions.ack(name, kind, token, asked.wake_id, asked.generation, acks, done=asked.done)
    return reply_of(acked) if isinstance(acked, Refusal) else Reply(200, {"ok": True, "next_wake": acked[0]})


def _done(changed: Subscription | Refusal) -> Reply:
    return reply_of(changed) if isinstance(changed, Refusal) else Reply(204)


def _claimed(claimed: "tuple[Subscription, str] | Refusal") -> Reply:
    if isinstance(claimed, Refusal):
        return reply_of(claimed)
    there, token = claimed
    assert there.wake is not None
    value = {
        "wake_id": there.wake.id,
        "generation": there.generation,
        "token": token,
        "streams": linked(there),
        "lease_ttl_ms": there.config.lease_ms,
    }
    return Reply(200, value)


def shown(there: Subscription, signer: Signer, base_url: str) -> Mapping[str, object]:
    """Give a subscription as clients see it (6.3)."""
    config = there.config
    signing = {"alg": "ed25519", "kid": signer.kid, "jwks_url": f"{base_url}/{_paths.CONTROL}/jwks.json"}
    at = datetime.fromtimestamp(there.created_at, UTC)
    return {
        "id": there.id,
        "subscription_id": there.id,
        "type": config.type,
        "pattern": config.pattern or None,
        "streams": [{key: link[key] for key in ("path", "link_type", "acked_offset")} for link in linked(there)],
        "webhook": {"url": config.url, "signing": signing} if config.url else None,
        "wake_stream": config.wake_stream or None,
        "lease_ttl_ms": config.lease_ms,
        "created_at": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z",
        "status": "failed" if there.failures else "active",
        "description": config.description or None,
    }


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise RefusedError(401, "a token is missing", name="TOKEN_INVALID", headers=(("www-authenticate", "Bearer"),))
    return token.strip()


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refused(f"the body is not what this takes: {error}") from None
