"""The commands: what each takes, and what it asks of a manager."""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import unquote, urlsplit

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter
from cyclopts.validators import Number

from .._copy import copy_streams, ids_with
from .._credentials import is_loopback
from .._info import StreamStatus
from .._manager import StreamManager, checked_id
from ..errors import StreamkeepError
from ..events import StreamEventType
from ..storages import storage_for
from ._output import CommandError, Copying, Output, complain, shown_url

PAGE_STREAMS: Final = 100
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141
WHICH_STORAGE: Final = "which storage? give its URL by --storage, or in STREAMKEEP_STORAGE"

app = App(
    name="streamkeep",
    help="Durable streams: look at the streams of a storage, serve them, check a deployment, run the demo.",
    help_epilogue="Exit codes: 0 done, 1 failed (of tail: or the stream ended in an error; of copy: or a stream is not whole at the "
    "target; of check: or something is wrong), 2 wrongly called, 130 interrupted.",
    help_format="plaintext",
    result_action="return_value",
)

Id = Annotated[str, Parameter(help="The stream's id.")]
Storage = Annotated[
    str,
    Parameter(env_var="STREAMKEEP_STORAGE", help="The storage's URL: sqlite:///relative.db, sqlite:////absolute.db, ..."),
]
Header = Annotated[
    list[str] | None,
    Parameter(negative="", help="Of a URL: a header more, NAME:VALUE. A token is better kept in STREAMKEEP_TOKEN."),
]
StorageOfId = Annotated[
    str | None, Parameter(env_var="STREAMKEEP_STORAGE", help="The storage's URL; not for a stream that has one.")
]
IdOrURL = Annotated[str, Parameter(help="The stream's id; or, for one of a server, its URL: https://HOST/streams/ID.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object a line, for machines.")]
Host = Annotated[str, Parameter(help="The address to listen on.")]
Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535), help="The port to listen on; 0: any that is free.")]
Drain = Annotated[
    float, Parameter(validator=Number(gte=0), help="At shutdown: how many seconds streams in flight may take to end.")
]
AllowRemote = Annotated[
    bool,
    Parameter(negative="", help="Let other machines in. Nobody is asked who they are: whoever has an id reads and stops."),
]
DurableStreams = Annotated[
    bool,
    Parameter(
        name="--durable-streams",
        negative="",
        help="Also serve streams of the Durable Streams protocol, under /v1/stream/PATH, to whoever reaches this: to be made, "
        "written, read and deleted.",
    ),
]


@app.command
def demo(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    storage: Storage = "sqlite:///streamkeep-demo.db",
    tokens_per_second: Annotated[float, Parameter(validator=Number(gt=0), help="The pace of the answer.")] = 30.0,
    open_: Annotated[bool, Parameter(name="--open", help="Open the page in a browser.")] = False,
    drain: Drain = 10.0,
    allow_remote: AllowRemote = False,
) -> int:
    """Run a Genkit app with a page, to reload, cut, stop and kill in mid-answer."""
    from ..demo import create_app
    from ..http import StreamsHTTP
    from ._serving import bind, serve_app

    def announce(url: str) -> None:
        Output().welcome_to_demo(url, shown_url(storage), os.getpid())
        if open_:
            import webbrowser

            webbrowser.open(url)

    async def serve() -> None:
        async with (
            StreamManager.connect(storage, ttl=timedelta(hours=1)) as streams,
            StreamsHTTP(streams, drain=timedelta(seconds=drain), drain_on_signal=False) as streams_http,
        ):
            web_app = create_app(streams_http, tokens_per_second=tokens_per_second, storage=storage)
            await serve_app(web_app, listener, streams_http.drain, announce)

    with bind(host, port, allow_remote=allow_remote) as listener:
        asyncio.run(serve())
    return 0


@app.command(name="serve")
def serve(
    *,
    storage: Storage,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allow_remote: AllowRemote = False,
    durable_streams: DurableStreams = False,
) -> int:
    """Serve the streams of a storage over HTTP: GET /streams/ID as SSE, /streams/ID/info, DELETE /streams/ID to stop it.

    Nobody is asked who they are: whoever has an id may read and stop that stream. So it listens to this machine only, unless
    --allow-remote says otherwise. Streams that were started for a known owner are not served: for those, mount
    StreamsHTTP(streams, authorize=...) in your own app.
    GET /healthz answers 200 while the storage can be read.
    """
    from ..durable_streams import durable_streams as protocol_app
    from ..http import StreamsHTTP
    from ._serving import PROTOCOL_ROOT, bind, reading_app, serve_app

    def announce(url: str) -> None:
        Output().welcome_to_serve(url, shown_url(storage), PROTOCOL_ROOT if durable_streams else None)

    async def serve_streams() -> None:
        # Of the protocol, streams are made here: a storage that is not there yet is, too.
        opened = StreamManager.connect(storage) if durable_streams else _existing(storage)
        async with opened as streams, StreamsHTTP(streams, drain_on_signal=False) as streams_http:
            if not durable_streams:
                await serve_app(reading_app(streams_http), listener, streams_http.drain, announce)
                return
            # Not for pages of other origins: a page that somebody happens to visit must not reach this machine's streams.
            async with protocol_app(streams, cors=None, subscriptions="local") as protocol:

                async def drain() -> None:
                    await protocol.drain()
                    await streams_http.drain()

                await serve_app(reading_app(streams_http, protocol), listener, drain, announce)

    with bind(host, port, allow_remote=allow_remote) as listener:
        asyncio.run(serve_streams())
    return 0


@app.command
def inspect(
    storage: Annotated[
        str, Parameter(env_var="STREAMKEEP_STORAGE", help="The storage's URL: sqlite:///relative.db, https://HOST/storage, ...")
    ],
    /,
    *,
    port: Port = 0,
    read_only: Annotated[bool, Parameter(negative="", help="Stop and delete nothing.")] = False,
    open_: Annotated[bool, Parameter(name="--open", help="Open the page in a browser.")] = False,
) -> int:
    """Show the streams of a storage on a page: which there are, what comes, who writes; replay, stop and delete them.

    It listens to this machine only. The URL that it prints has a secret in it: whoever has that sees all streams, and may stop and
    delete them.
    """
    from ..inspector import Inspector
    from ._inspecting import opened_in_browser, serves_loopback_only, tokens_bearer
    from ._serving import bind, serve_app

    token = secrets.token_urlsafe(32)

    async def inspect_streams() -> None:
        async with _existing(storage) as streams:
            inspector = Inspector(streams, authorize=tokens_bearer(token), read_only=read_only, show_internal=True)

            def announce(url: str) -> None:
                page = f"{url}/#token={token}"
                Output().welcome_to_inspector(page, shown_url(storage), read_only=read_only)
                if open_:
                    opening.enter_context(opened_in_browser(page))

            with ExitStack() as opening:
                await serve_app(serves_loopback_only(inspector), listener, inspector.drain, announce)

    with bind("127.0.0.1", port, allow_remote=False) as listener:
        asyncio.run(inspect_streams())
    return 0


@app.command(name="list")
def list_(
    *,
    storage: Storage,
    owner: Annotated[str | None, Parameter(help="Only streams of this owner; of nobody, if it is empty.")] = None,
    key_prefix: Annotated[
        str | None,
        Parameter(help="Only the newest stream of each key that begins with this, by key; --owner says whose keys."),
    ] = None,
    status: Annotated[StreamStatus | None, Parameter(help="Only streams that have this status.")] = None,
    json: Json = False,
) -> int:
    """List the streams of a storage, by id, as they are found."""
    output = Output(json=json)

    async def run() -> None:
        async with _existing(storage) as streams:
            after: str | None = ""
            while after is not None:
                page = await streams.list(after, PAGE_STREAMS, owner=owner, key_prefix=key_prefix, status=status)
                output.streams(page)
                after = page.next

    asyncio.run(run())
    output.end_of_streams()
    if key_prefix is not None and owner is None and not output.has_streams:
        complain("no such keys without an owner; --owner says whose keys")
    return 0


@app.command
def info(id: Id, /, *, storage: Storage, json: Json = False) -> int:
    """Say what is known of a stream."""

    async def run() -> None:
        async with _existing(storage) as streams:
            Output(json=json).info(await streams.info(id))

    asyncio.run(run())
    return 0


@app.command
def tail(
    id: IdOrURL,
    /,
    *,
    storage: StorageOfId = None,
    after: Annotated[int | None, Parameter(help="Only events with a greater offset than this.")] = None,
    last: Annotated[int | None, Parameter(help="Only so many of those that are stored; 0: from now on.")] = None,
    follow: Annotated[bool, Parameter(help="Go on live until its end.")] = True,
    header: Header = None,
    json: Json = False,
) -> int:
    """Print the events of a stream, first those that are stored, then live until its end; exit with 1 if that is an error.

    One of a server is gone on with by itself when its connection is lost. The token in STREAMKEEP_TOKEN, if there is one, is sent to that
    server as `Authorization: Bearer`; others of the machine do not see it in the list of processes.
    """
    output = Output(json=json)
    is_url = _is_url(id, storage, header)

    async def run() -> bool:
        assert storage is not None
        async with _existing(storage) as streams, streams.subscribe(id, after, last=last, follow=follow) as events:
            async for event in events:
                output.event(event)
                if event.type is StreamEventType.ERROR:
                    return True
            return (await streams.info(id)).status == "error"

    if is_url:
        from ._remote import tail_url

        return int(asyncio.run(tail_url(output, id, header or (), after=after, last=last, follow=follow)))
    return int(asyncio.run(run()))


@app.command
def cancel(id: IdOrURL, /, *, storage: StorageOfId = None, header: Header = None, json: Json = False) -> int:
    """Stop a stream: end it with an error of status CANCELLED, and tell its producer. One that has ended is left as it is.

    The token in STREAMKEEP_TOKEN is sent to the server of a URL, as by tail.
    """

    async def run() -> bool:
        assert storage is not None
        async with _existing(storage) as streams:
            return await streams.cancel(id)

    if _is_url(id, storage, header):
        from ._remote import cancel_url

        stopped = asyncio.run(cancel_url(id, header or ()))
    else:
        stopped = asyncio.run(run())
    Output(json=json).outcome(shown_url(id), {"stopped": stopped}, "stopped" if stopped else "had ended already")
    return 0


@app.command
def delete(id: Id, /, *, storage: Storage, json: Json = False) -> int:
    """Forget a stream and its events at once, open or not."""

    async def run() -> None:
        async with _existing(storage) as streams:
            await streams.delete(id)

    asyncio.run(run())
    Output(json=json).outcome(id, {"deleted": True}, "deleted")
    return 0


@app.command
def copy(
    source: Annotated[str, Parameter(help="The URL of the storage to copy from; it is only read.")],
    target: Annotated[str, Parameter(help="The URL of the storage to copy to; a SQLite file is created if it is missing.")],
    /,
    *ids: Annotated[str, Parameter(help="The streams' ids; all, if none is named.")],
    prefix: Annotated[str, Parameter(help="All streams whose ids begin with this.")] = "",
    json: Json = False,
) -> int:
    """Copy streams from one storage to another; interrupted, even killed, it goes on where it was when it is run again.

    A stream is copied with its events, metadata, state and expiry. One that is being written is copied as far as it is: run this again when
    its writer has ended. What is at the target already is not copied again, and a stream that differs there is left alone. Exit
    code 0: all of it is at the target.
    """
    if ids and prefix:
        raise CommandError("name streams, or give a prefix, not both", 2)
    for name in [prefix] if prefix else ids:
        checked_id(name)
    if source == target:
        raise CommandError("the two storages are the same", 2)
    from_storage, to_storage = storage_for(source), storage_for(target)
    for url in (source, target):
        _check_is_shared(url)
    _check_exists(source)

    async def named() -> AsyncGenerator[str]:
        for stream in dict.fromkeys(ids):
            yield stream

    async def run() -> int:
        async with from_storage, to_storage:
            streams = named() if ids else ids_with(from_storage, prefix)
            with Copying(Output(json=json)) as copying:
                await copy_streams(from_storage, to_storage, streams, report=copying.report, progress=copying.progress)
        return int(not copying.is_whole)

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        complain("interrupted: run it again, and it goes on from here")
        raise


@app.command
def check(
    url: Annotated[str, Parameter(help="Where the app has mounted its CheckHTTP: https://HOST/check.")],
    /,
    *,
    seconds: Annotated[
        float, Parameter(validator=Number(gte=1, lte=60), help="How long each answer lasts that is read.")
    ] = 5.0,
    idle: Annotated[
        float | None,
        Parameter(validator=Number(gte=0, lte=590), help="How long one is silent; by default until a heartbeat is due."),
    ] = None,
    origin: Annotated[
        str, Parameter(help="The origin of pages on another one, which are to be let in: https://front.example.")
    ] = "",
    readers: Annotated[int, Parameter(validator=Number(gte=1, lte=100), help="How many read one answer at once.")] = 5,
    header: Header = None,
    json: Annotated[bool, Parameter(name="--json", negative="", help="All that was seen, as one JSON object.")] = False,
) -> int:
    """Check a deployment through its own proxy and storage, and say what is wrong with it; exit with 1 if something is.

    The app mounts CheckHTTP for it, with a token that is to be in STREAMKEEP_TOKEN. Answers of numbered chunks are started, cut, reloaded,
    resumed, stopped and read by several; what is lost, late, repeated, held back or cut is told, with how to mend it. Warnings alone are no
    failure. It always ends, and stops what it has started.
    """
    from ._check import Options, as_json, checked_origin, judge, lines, target_of
    from ._check import check as checked
    from ._headers import headers_for

    output = Output(json=json)

    def progress(step: str) -> None:
        if not json and sys.stderr.isatty():
            sys.stderr.write(f"streamkeep: {step}\n")

    target = target_of(url, headers_for(url, header or ()))
    if target.headers and target.tls is None and not is_loopback(target.host):
        complain(f"the token is sent to {target.host} in clear text, over http://, for all on the way to read; use https://")
    seen = asyncio.run(checked(target, Options(seconds, idle, checked_origin(origin), readers), progress))
    findings = judge(seen)
    output.report(as_json(url, seen, findings), lines(seen, findings))
    return int(any(finding.level == "failure" for finding in findings))


def run() -> int:
    """Run the command that the arguments name, and give its exit code; what goes wrong is one sentence on stderr."""
    try:
        code: int = app(exit_on_error=False, print_error=False) or 0
        sys.stdout.flush()
    except CycloptsError as error:
        complain(_wrong_call(error))
        return 2
    except CommandError as error:
        complain(str(error))
        return error.code
    except StreamkeepError as error:
        complain(str(error))
        return 2 if error.status == "INVALID_ARGUMENT" else 1
    except BrokenPipeError:
        # `streamkeep tail ID | head`: nobody reads on, not even what Python would flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _is_url(id: str, storage: str | None, header: list[str] | None) -> bool:
    """Say whether a stream is one of a server, named by its URL. CommandError: what it takes to find it is not given."""
    if id.startswith(("http://", "https://")):
        return True
    if header:
        raise CommandError("--header is for a stream that is named by its URL", 2)
    if storage is None:
        raise CommandError(WHICH_STORAGE, 2)
    return False


def _wrong_call(error: CycloptsError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        if name == "--storage":
            return WHICH_STORAGE
        if name == "STORAGE":
            return "which storage? give its URL, or set STREAMKEEP_STORAGE"
    return str(error)


@asynccontextmanager
async def _existing(storage: str) -> AsyncGenerator[StreamManager]:
    """Give a manager over a storage that is there already: looking at one must not create it."""
    manager = StreamManager.connect(storage)
    _check_is_shared(storage)
    _check_exists(storage)
    async with manager as streams:
        yield streams


def _check_is_shared(storage: str) -> None:
    if urlsplit(storage).scheme == "memory":
        raise CommandError("memory:// lives and dies inside one process; there is nothing to see of it from another")


def _check_exists(storage: str) -> None:
    parts = urlsplit(storage)
    if parts.scheme == "sqlite" and not (path := Path(unquote(parts.path.removeprefix("/")))).is_file():
        raise CommandError(f"there is no database at {path}")
