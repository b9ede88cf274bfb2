"""What is left after a power cut, as streamkeep itself finds it: the real SQLite storage on a directory that holds just that.

`recover` gives what is stored, or raises `DamageError`; it does not know what should be there.
"""

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Final
from urllib.parse import quote

import anyio
from tests.powerloss.disk import Image

from streamkeep import (
    StreamBusyError,
    StreamEvent,
    StreamEventType,
    StreamInfo,
    StreamInput,
    StreamkeepError,
    StreamManager,
)
from streamkeep._lifecycle import SESSION_PREFIX, Terms, life_of, renew, session_id, session_of
from streamkeep.events import is_terminal
from streamkeep.storage import Head, Storage
from streamkeep.storages.sqlite import SQLiteStorage

DATABASE: Final = "streams.db"
BOUND_SECONDS: Final = 60

_BYSTANDERS: Final = ("-lock", "-notify", "-shm")
_STRAY: Final = """
    SELECT 'stream ' || s.id || ' holds not the offsets below ' || s.tail FROM streams s LEFT JOIN records r ON r.stream = s.key
    GROUP BY s.key HAVING count(r.offset) != s.tail OR min(r.offset) != 0 OR max(r.offset) != s.tail - 1
    UNION ALL SELECT 'a record belongs to no stream' FROM records WHERE stream NOT IN (SELECT key FROM streams)
"""

Log = tuple[Head, tuple[bytes, ...]]
"""A stream as it is stored."""
State = Mapping[str, Log]
"""All streams, by id."""


class OneLoopStorage(SQLiteStorage):
    """All that is asked of it is asked in one event loop, the session's renewals as well, and so in an order."""

    earliest = 0.0
    """Its time is this or later: what it holds may have been written by a clock that is ahead of this one."""

    def time(self) -> float:
        """See `Storage.time`."""
        return max(super().time(), self.earliest)

    def clone(self) -> None:  # type: ignore[override] # the contract allows it
        """See `Storage.clone`."""


class DamageError(Exception):
    """What survived is not whole, or cannot be gone on with."""


async def recover(image: Image, directory: Path) -> State:
    """Give what is stored in what has survived. DamageError: it is not whole, or streamkeep cannot go on with it."""
    put_down(image, directory)
    path = directory / DATABASE
    try:
        with anyio.fail_after(BOUND_SECONDS):
            async with OneLoopStorage(path, synchronous="NORMAL") as storage:
                state = await read_all(storage)
                _check_file(path)
                _check_logs(state)
                storage.earliest = latest_in(state)
                await go_on(storage, state)
            _check_file(path)
    except (StreamkeepError, sqlite3.Error, TimeoutError) as error:
        raise DamageError(f"{type(error).__name__}: {error}") from error
    return state


def latest_in(state: State) -> float:
    """Give the latest time at which a writer has let go of a stream, by the clock of that writer."""
    streams = [life_of(head) for stream, (head, _) in state.items() if not stream.startswith(SESSION_PREFIX)]
    return max((life.state.free_at for life in streams), default=0.0)


def put_down(image: Image, directory: Path) -> None:
    """Make the directory hold what has survived, and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    for name, content in {**_bystanders(image), **image}.items():
        (directory / name).write_bytes(content)


def digest_of(image: Image) -> str:
    """Give what stands for just these files."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(image.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


async def read_all(storage: Storage) -> State:
    """Give all that a storage holds."""
    state: dict[str, Log] = {}
    after = ""
    while page := await storage.scan(after):
        after = page[-1][0]
        for stream, _ in page:
            log = await _read(storage, stream)
            if log is not None:
                state[stream] = log
    return state


async def go_on(storage: Storage, state: State) -> None:
    """Take over every open stream and complete it, begin and complete a new one. DamageError: they cannot be read as that."""
    lives = {stream: life_of(head) for stream, (head, _) in state.items() if not stream.startswith(SESSION_PREFIX)}
    open_streams = [stream for stream, life in lives.items() if life.state.status == "open"]
    new_stream = next(name for number in count() if (name := f"begun-afterwards-{number}") not in state)
    await end_sessions(storage)
    async with StreamManager(storage, grace=timedelta(days=9999)) as streams:
        await asyncio.gather(*(_complete(streams, stream) for stream in [*open_streams, new_stream]))
        for info in await streams.list():
            async with streams.subscribe(info.id) as events:
                _check_events([event async for event in events], info)


async def end_sessions(storage: Storage) -> None:
    """Say of all sessions that they are over, so that nobody has to wait until it is seen that their processes are dead."""
    heads = dict(await storage.scan(limit=1_000))
    written = {life_of(head).state.session for stream, head in heads.items() if not stream.startswith(SESSION_PREFIX)}
    for session in sorted(written - {""}):
        head = heads.get(session_id(session))
        if head is None or not session_of(head).is_over:
            over = renew(head, 1_000_000, storage.time(), session, Terms(0.0, 1.0, 1.0), is_over=True)
            assert await storage.commit(session_id(session), None if head is None else head.version, over)


async def resume(streams: StreamManager, stream: str) -> StreamInput:
    """Take over from a writer whose session is over, as soon as that is seen."""
    while True:
        try:
            return await streams.open(stream, resume=True)
        except StreamBusyError:
            await anyio.sleep(0.001)


async def _complete(streams: StreamManager, stream: str) -> None:
    async with await resume(streams, stream) as successor:
        tail = successor.tail
        if successor.write_soon("after the cut") != tail:
            raise DamageError(f"a new writer of {stream} does not go on at offset {tail}")
        await successor.done()


def _check_events(events: Sequence[StreamEvent[object]], info: StreamInfo) -> None:
    offsets = [event.offset for event in events]
    if offsets != list(range(info.tail)):
        raise DamageError(f"{info.id} has {info.tail} events, and its reader gets {offsets}")
    ends = [event.offset for event in events if event.type is not StreamEventType.CHUNK]
    if ends != [info.tail - 1]:
        raise DamageError(f"{info.id} is completed, and its terminal events are {ends} of {info.tail}")


def _check_logs(state: State) -> None:
    for stream, (head, records) in state.items():
        if stream.startswith(SESSION_PREFIX):
            continue
        if len(records) != head.tail:
            raise DamageError(f"{stream} has {len(records)} records, and its head says {head.tail}")
        ends = [offset for offset, record in enumerate(records) if is_terminal(record)]
        expected = [] if life_of(head).state.status == "open" else [head.tail - 1]
        if ends != expected:
            raise DamageError(f"{stream} is {life_of(head).state.status}, and its terminal records are {ends} of {head.tail}")


def _check_file(path: Path) -> None:
    with closing(sqlite3.connect(f"file:{quote(os.fspath(path))}?mode=ro", uri=True)) as db:
        found = [*db.execute("PRAGMA integrity_check"), *db.execute(_STRAY)]
    if found != [("ok",)]:
        raise DamageError(f"the database is not whole: {found}")


def _bystanders(image: Image) -> Image:
    # None of them is ever synced, so they may be missing, or hold anything. (What is in the image differs from run to run.)
    random = Random(repr([(name, len(content)) for name, content in sorted(image.items())]))
    contents = [None, b"", bytes(random.randrange(20_000)), random.randbytes(random.randrange(20_000)), b"\xff" * 16_400]
    chosen = {DATABASE + suffix: random.choice(contents) for suffix in _BYSTANDERS}
    return {name: content for name, content in chosen.items() if content is not None}


async def _read(storage: Storage, stream: str) -> Log | None:
    page = await storage.read(stream, 0, 1 << 30)
    if page is None:
        return None
    records = list(page.records)
    while page.records:
        page = await storage.read(stream, len(records), 1 << 30)
        assert page is not None
        records += page.records
    return page.head, tuple(records)
