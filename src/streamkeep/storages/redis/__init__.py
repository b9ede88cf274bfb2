"""RedisStorage: streams in Redis or Valkey, which any number of processes on any number of machines may share; asyncio only."""

import asyncio
import hashlib
import logging
import math
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Final

from streamkeep._extras import needed_by

with needed_by(__name__, "redis"):
    import hiredis as hiredis  # as what others use, for `_net` does; `redis` is often installed without it
    from redis.exceptions import AskError, OutOfMemoryError, ResponseError, TryAgainError

from streamkeep.errors import (
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from streamkeep.storage import PAGE_BYTES, Doorbell, Head, Page
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._batch_task import BatchTask
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages._ids import id_bytes
from streamkeep.storages.redis._bells import CHANNEL, Bells
from streamkeep.storages.redis._net import Command, Reply, translated
from streamkeep.storages.redis._servers import BUCKETS, Pipelines, Request, Servers, bucket_of
from streamkeep.storages.redis._url import Address, Topology, options_of, shown

__all__ = ["RedisStorage"]

logger: Final = logging.getLogger("streamkeep")

_FORMAT: Final = b"3"
_OLDEST: Final = (7, 0)
_NEVER_SECONDS: Final = 1e11
_SLACK_SECONDS: Final = 60
"""Servers forget a stream by themselves so long after its expiry, in case that nobody sweeps. Managers go by the head."""
_READS_AT_ONCE: Final = 64
_LEAST_PAGE_BYTES: Final = 64 << 10

# Each key of a stream begins with the hash tag of its bucket:
#   {prefix:7}:head:ID   "version tail first expires_at state"; a string, so that one SET replaces it and its expiry
#   {prefix:7}:log:ID    a list of the records, from the first that is kept on
#   {prefix:7}:ids       the ids of the bucket, all with score 0, and so in the order of their bytes, which is that of their code points
#   {prefix:7}:due       the same ids, scored by expires_at
#   {prefix:0}:format    what of all this a newer streamkeep may do otherwise
_HEAD: Final = b":head:"
_LOG: Final = b":log:"
_IDS: Final = b":ids"
_DUE: Final = b":due"
_FORMAT_KEY: Final = b":format"
_NOBODY: Final = b"\xff"  # not UTF-8, and so the id of no stream

# The first write is one that a server without memory refuses: so it refuses all or nothing. Versions are compared as text, because a
# number of Lua has 53 bits. A commit that has happened is written once more if replicas are to be waited for. An expiry that stays is left
# alone, in every key.
_FIRST_OF: Final = b"""
local function first_of(head) return tonumber(string.match(head, '^%d+ %d+ (%d+) ') or 0) end
"""
_COMMIT: Final = (
    _FIRST_OF
    + b"""
local head_key, log_key, ids_key, due_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local seen, tail, first, head, due, forget_at, id, channel, again = unpack(ARGV, 1, 9)
local old = redis.call('GET', head_key)
local old_first, length = 0, 0
if not old then
  if seen ~= '' then return 0 end
elseif seen == '' or string.sub(old, 1, #seen) ~= seen then
  if again == '' or old ~= head then return 0 end
  if redis.pcall('SET', head_key, head, 'KEEPTTL').err then return -2 end
  return 1
else
  old_first, length = first_of(old), redis.call('LLEN', log_key)
  if length ~= tonumber(tail) - old_first then return -1 end
end
local is_same = old and string.match(old, '^%d+ %d+ %d+ (%S+) ') == due
if is_same then
  redis.call('SET', head_key, head, 'KEEPTTL')
elseif forget_at == '' then
  redis.call('SET', head_key, head)
else
  redis.call('SET', head_key, head, 'PXAT', forget_at)
end
if not old then
  redis.call('DEL', log_key)
  redis.call('ZADD', ids_key, 0, id)
end
for at = 10, #ARGV, 1000 do
  redis.call('RPUSH', log_key, unpack(ARGV, at, math.min(at + 999, #ARGV)))
end
if tonumber(first) > old_first then redis.call('LTRIM', log_key, tonumber(first) - old_first, -1) end
if not is_same then redis.call('ZADD', due_key, due, id) end
if forget_at == '' then
  if not is_same then redis.call('PERSIST', log_key) end
elseif not is_same or length == 0 then
  redis.call('PEXPIREAT', log_key, forget_at)
end
redis.call('PUBLISH', channel, '')
return 1
"""
)

# Whatever the server has forgotten by itself goes out of the indexes, whichever version of it is to be deleted.
_DELETE: Final = b"""
local seen, id, channel = unpack(ARGV)
local old = redis.call('GET', KEYS[1])
if old then
  if string.sub(old, 1, #seen) ~= seen then return 0 end
  redis.call('UNLINK', KEYS[1], KEYS[2])
end
redis.call('ZREM', KEYS[3], id)
redis.call('ZREM', KEYS[4], id)
if not old then return 0 end
redis.call('PUBLISH', channel, '')
return 1
"""

# In steps, because what a step gives is in memory twice before it is counted: one record, and then as many as there is room for if they are
# like those before, but never very many.
_READ: Final = (
    _FIRST_OF
    + b"""
local page = {redis.call('GET', KEYS[1])}
if not page[1] then return false end
local first, room = first_of(page[1]), tonumber(ARGV[3])
local at, stop = tonumber(ARGV[1]) - first, tonumber(ARGV[2]) - first
if at < 0 then return page end
local count, size = 1, 0
while at < stop do
  local step = redis.call('LRANGE', KEYS[2], at, math.min(at + count, stop) - 1)
  if #step == 0 then break end
  for _, record in ipairs(step) do
    page[#page + 1] = record
    size = size + #record
    if size >= room then return page end
  end
  at = at + #step
  count = math.ceil(math.min(32, (room - size) * (#page - 1) / math.max(size, 1)))
end
return page
"""
)

# The heads of the ids are the keys from the third on. One that is not a string is somebody else's, and never swept.
_DROP_FORGOTTEN: Final = b"""
for i, id in ipairs(ARGV) do
  local kind = redis.call('TYPE', KEYS[2 + i]).ok
  if kind == 'none' then redis.call('ZREM', KEYS[1], id) end
  if kind ~= 'string' then redis.call('ZREM', KEYS[2], id) end
end
return 1
"""


class RedisStorage(AsyncioStorage["_Entered"]):
    """Keeps streams in the Redis (7.0 or newer) or Valkey that `url` names.

    - `redis://USER:PASSWORD@HOST:6379/0`: one server; `rediss://` with TLS, and `?ssl_ca_certs=`, `ssl_certfile=`, `ssl_keyfile=`.
    - `redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/PRIMARY/0`: whatever the sentinels call the primary;
      `?sentinel_username=`, `sentinel_password=` if they ask for other credentials.
    - `redis+cluster://HOST:7000,HOST:7001`: a cluster, of which some nodes are named.
    - `?prefix=`: what its keys begin with, `streamkeep` unless said otherwise. Storages of different prefixes know nothing of one another.
    - `?wait=`: how many replicas must have a commit before it returns True.

    What a commit that has returned True survives is up to the server: `docs/how-to/redis.md` has the table. The server itself forgets
    expired streams, a minute late, if nobody has deleted them until then. Its clock is the storage's;
    in a cluster, one node's. A process has three connections, one each to write, to read and for doorbells, whatever its streams and
    subscribers; in a cluster as many to each node. A clone has as many again.

    Entering raises StorageError if the server is too old, evicts keys, or refuses what streamkeep does, and StorageUnavailableError if it
    cannot be reached. Leaving waits for the commits that were asked for.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._options = options_of(url)
        super().__init__(self._options.name)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        entered = self._open
        stop = start + limit
        reply = await entered.reader.ask(entered.scripts.read(id_bytes(stream), start, stop))
        return None if reply is None else self._page(reply, start, stop)

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        entered = self._open
        return self._done(await entered.writer.ask(entered.scripts.commit(id_bytes(stream), seen, head, records)))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        entered = self._open
        return self._done(await entered.writer.ask(entered.scripts.delete(id_bytes(stream), seen)))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        last = id_bytes(after)
        while ids := await self._ids(last, limit):
            if found := (await self._heads(ids)).found:
                return [(stream.decode(), head) for stream, head in found]
            last = ids[-1]
        return []

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`. What the server has forgotten by itself is not given; but its id is forgotten here."""
        while ids := await self._due(before, limit):
            heads = await self._heads(ids)
            if heads.unreadable:
                await self._never_due(heads.unreadable)
            if found := [(stream.decode(), head) for stream, head in heads.found if head.expires_at <= before]:
                return found
            if not heads.forgotten and not heads.unreadable:
                break  # all have just been put off
        return []

    def time(self) -> float:
        """See `Storage.time`."""
        return self._open.clock.time()

    def clone(self) -> "RedisStorage":
        """See `Storage.clone`."""
        return RedisStorage(self._url)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`."""
        async with self._open.bells.watch(id_bytes(stream)) as doorbell:
            yield doorbell

    async def _ids(self, after: bytes, limit: int) -> list[bytes]:
        """Give ids of all buckets, in order; there are no more if there are fewer than `limit`."""
        scripts, first = self._open.scripts, b"(" + after if after else b"-"
        found: list[bytes] = []
        for each in _shares(limit):
            by_bucket = await self._of_buckets(partial(scripts.ids, first=first, limit=each))
            # Where a bucket may have more, what comes after its last one is not known.
            known = min((ids[-1] for ids in by_bucket if len(ids) == each), default=None)
            found = sorted(stream for stream in chain.from_iterable(by_bucket) if known is None or stream <= known)
            if known is None or len(found) >= limit:
                break
        return found[:limit]

    async def _due(self, before: float, limit: int) -> list[bytes]:
        scripts = self._open.scripts
        due: list[bytes] = []
        for each in _shares(limit):
            by_bucket = await self._of_buckets(partial(scripts.due, before=before, limit=each))
            due = list(chain.from_iterable(by_bucket))
            if len(due) >= limit or max(map(len, by_bucket)) < each:
                break
        return due[:limit]

    async def _of_buckets(self, request: Callable[[int], Request]) -> list[list[bytes]]:
        reader = self._open.reader
        return [_list(ids) for ids in await asyncio.gather(*[reader.ask(request(bucket)) for bucket in range(BUCKETS)])]

    async def _heads(self, ids: Sequence[bytes]) -> "_Heads":
        """Give the heads of these, and have the server forget the ids of those whose heads it has forgotten."""
        entered = self._open
        replies = dict(chain.from_iterable(await asyncio.gather(*map(self._heads_of_bucket, *_by_bucket(ids)))))
        heads = _Heads([], [], [])
        for stream in ids:
            if (reply := replies[stream]) is None:
                heads.forgotten.append(stream)
                continue
            try:
                heads.found.append((stream, self._head(reply)))
            except StorageCorruptError as error:
                logger.warning("Passing over stream %r: %s", stream.decode(errors="replace"), error)
                heads.unreadable.append(stream)
        dropped = map(entered.scripts.drop_forgotten, *_by_bucket(heads.forgotten))
        await asyncio.gather(*map(entered.writer.ask, dropped))
        return heads

    async def _heads_of_bucket(self, bucket: int, ids: Sequence[bytes]) -> list[tuple[bytes, Reply]]:
        entered = self._open
        try:
            replies = _list(await entered.reader.ask(entered.scripts.heads(bucket, ids)))
        except StorageUnavailableError as error:
            if not isinstance(error.__cause__, TryAgainError):
                raise
            # The slot is being moved, and some of them are here, and some there.
            asked = [entered.reader.ask(entered.scripts.heads(bucket, [stream])) for stream in ids]
            replies = [_list(reply)[0] for reply in await asyncio.gather(*asked)]
        return list(zip(ids, replies, strict=True))

    async def _never_due(self, ids: Sequence[bytes]) -> None:
        """Leave what cannot be read where it is, out of the way of what can be swept."""
        entered = self._open
        await asyncio.gather(*[entered.writer.ask(entered.scripts.never_due(stream)) for stream in ids])

    def _done(self, reply: Reply) -> bool:
        if reply == -2:
            raise StorageUnavailableError(
                f"{self._name}: stored, but there is no memory to ask once more whether replicas (wait) have it"
            )
        if reply == -1:
            raise StorageCorruptError(
                f"{self._name}: a log is not as long as its head says; has somebody, or an eviction, removed keys?"
            )
        return reply == 1

    def _page(self, reply: Reply, start: int, stop: int) -> Page:
        data, *records = _list(reply)
        head = self._head(data)
        wanted = max(0, min(stop, head.tail) - start) if start >= head.first else 0
        if len(records) > wanted or (len(records) < wanted and sum(map(len, records)) < _LEAST_PAGE_BYTES):
            raise StorageCorruptError(
                f"{self._name}: a log is not as long as its head says; has somebody, or an eviction, removed keys?"
            )
        return Page(head, records)

    def _head(self, reply: Reply) -> Head:
        try:
            version, tail, first, expires_at, state = _bytes(reply).split(b" ", 4)
            return Head(int(version), int(tail), state, float(expires_at), int(first))
        except ValueError:
            raise StorageCorruptError(f"{self._name}: a head is not streamkeep's; choose another prefix") from None

    async def _enter(self, stack: AsyncExitStack) -> "_Entered":
        servers = Servers(self._options)
        stack.push_async_callback(servers.close)
        scripts = _Scripts(servers)
        await _examine(servers, scripts)
        writing = Pipelines(servers, wait=servers.options.wait)
        stack.push_async_callback(writing.close)
        writer = await stack.enter_async_context(BatchTask(writing.run))
        reading = Pipelines(servers)
        stack.push_async_callback(reading.close)
        reader = await stack.enter_async_context(BatchTask(partial(_read, reading), max_batch=_READS_AT_ONCE))
        bells = await stack.enter_async_context(Bells(servers))
        return _Entered(writer, reader, bells, scripts, servers.clock)


def _list(reply: Reply) -> list[bytes]:
    assert isinstance(reply, list)
    return reply


def _bytes(reply: Reply) -> bytes:
    assert isinstance(reply, bytes)
    return reply


async def _read(pipelines: Pipelines, requests: Sequence[Request]) -> Sequence[Reply | StorageError]:
    """Ask, and share among those who ask for pages what one batch may bring: a mebibyte, or 64 KiB each if that is more."""
    pages = sum(request.is_page for request in requests)
    size = max(PAGE_BYTES // max(pages, 1), _LEAST_PAGE_BYTES)
    return await pipelines.run([request.of_size(size) if request.is_page else request for request in requests])


@dataclass(frozen=True, slots=True)
class _Heads:
    """What became of some ids."""

    found: list[tuple[bytes, Head]]
    forgotten: list[bytes]
    unreadable: list[bytes]


@dataclass(frozen=True, slots=True)
class _Entered:
    """What a storage has while it is open."""

    writer: BatchTask[Request, Reply]
    reader: BatchTask[Request, Reply]
    bells: Bells
    scripts: "_Scripts"
    clock: EngineClock


class _Scripts:
    """What is asked of servers, in their words."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._is_cluster = servers.options.topology == "cluster"
        publish = b"'SPUBLISH'" if self._is_cluster else b"'PUBLISH'"
        self._commit = _script(_COMMIT.replace(b"'PUBLISH'", publish))
        self._delete = _script(_DELETE.replace(b"'PUBLISH'", publish))
        self._read = _script(_READ)
        self._drop_forgotten = _script(_DROP_FORGOTTEN)
        self._again = b"1" if servers.options.wait else b""

    def commit(self, stream: bytes, seen: int | None, head: Head, records: Sequence[bytes]) -> Request:
        expires_at = head.expires_at
        due = repr(expires_at).encode()
        text = b"%d %d %d %s %s" % (head.version, head.tail, head.first, due, head.state)
        forget_at = b"%d" % ((expires_at + _SLACK_SECONDS) * 1000) if 0 < expires_at < _NEVER_SECONDS else b""
        tag = self._servers.tag(bucket := bucket_of(stream))
        keys = _keys(tag, stream)
        arguments: tuple[bytes | int, ...] = (
            _version(seen),
            head.tail - len(records),
            head.first,
            text,
            due,
            forget_at,
            stream,
            tag + CHANNEL + stream,
            self._again,
            *records,
        )
        return _request(bucket, self._commit, keys, arguments)

    def delete(self, stream: bytes, seen: int) -> Request:
        tag = self._servers.tag(bucket := bucket_of(stream))
        keys = _keys(tag, stream)
        return _request(bucket, self._delete, keys, (_version(seen), stream, tag + CHANNEL + stream))

    def read(self, stream: bytes, start: int, stop: int) -> Request:
        tag = self._servers.tag(bucket := bucket_of(stream))
        request = _request(bucket, self._read, (tag + _HEAD + stream, tag + _LOG + stream), (start, stop))
        return replace(request, is_page=True)

    def drop_forgotten(self, bucket: int, ids: Sequence[bytes]) -> Request:
        tag = self._servers.tag(bucket)
        keys = (tag + _IDS, tag + _DUE, *[tag + _HEAD + stream for stream in ids])
        return _request(bucket, self._drop_forgotten, keys, tuple(ids))

    def never_due(self, stream: bytes) -> Request:
        bucket = bucket_of(stream)
        return Request(bucket, ("ZREM", self._servers.tag(bucket) + _DUE, stream))

    def dry_run(self, bucket: int) -> list[Command]:
        """All that will be done, for an id that is none, and undone in the same moment."""
        commit, delete = self._commit[0], self._delete[0]
        tag = self._servers.tag(bucket)
        keys, channel = _keys(tag, _NOBODY), tag + CHANNEL + _NOBODY
        shard = "S" if self._is_cluster else ""
        return [
            ("MULTI",),
            (
                "EVAL",
                commit,
                4,
                *keys,
                "",
                0,
                0,
                b"1 1 0 0.0 ",
                "0.0",
                b"%d" % (_NEVER_SECONDS * 1000),
                _NOBODY,
                channel,
                "",
                b"record",
            ),
            ("EVAL", self._read[0], 2, *keys[:2], 0, 1, 1),
            ("EVALSHA", self._read[1], 2, *keys[:2], 0, 1, 1),
            ("EVAL", delete, 4, *keys, b"1 ", _NOBODY, channel),
            ("EXEC",),
            ("ZRANGEBYLEX", keys[2], "-", "+", "LIMIT", 0, 1),
            ("ZRANGEBYSCORE", keys[3], "-inf", "+inf", "LIMIT", 0, 1),
            ("MGET", keys[0]),
            ("TIME",),
            (shard + "SUBSCRIBE", channel),
            (shard + "UNSUBSCRIBE", channel),
        ]

    def ids(self, bucket: int, first: bytes, limit: int) -> Request:
        return Request(bucket, ("ZRANGEBYLEX", self._servers.tag(bucket) + _IDS, first, "+", "LIMIT", 0, limit))

    def due(self, bucket: int, before: float, limit: int) -> Request:
        key = self._servers.tag(bucket) + _DUE
        return Request(bucket, ("ZRANGEBYSCORE", key, "-inf", repr(before), "LIMIT", 0, limit))

    def heads(self, bucket: int, ids: Sequence[bytes]) -> Request:
        return Request(bucket, ("MGET", *[self._servers.tag(bucket) + _HEAD + stream for stream in ids]))


def _shares(limit: int) -> Sequence[int]:
    """Say how many to ask each bucket for, to get so many from all: twice its share, and if others have less, all."""
    share = 2 * math.ceil(limit / BUCKETS)
    return (share, limit) if share < limit else (limit,)


def _by_bucket(ids: Sequence[bytes]) -> tuple[Sequence[int], Sequence[Sequence[bytes]]]:
    """Give the buckets of these ids, and those of each."""
    by_bucket: dict[int, list[bytes]] = {}
    for stream in ids:
        by_bucket.setdefault(bucket_of(stream), []).append(stream)
    return list(by_bucket.keys()), list(by_bucket.values())


def _script(text: bytes) -> tuple[bytes, bytes]:
    return text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()


def _keys(tag: bytes, stream: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Give the keys that a change of a stream concerns."""
    return (tag + _HEAD + stream, tag + _LOG + stream, tag + _IDS, tag + _DUE)


def _request(bucket: int, script: tuple[bytes, bytes], keys: tuple[bytes, ...], arguments: tuple[bytes | int, ...]) -> Request:
    text, digest = script
    return Request(bucket, ("EVALSHA", digest, len(keys), *keys, *arguments), text)


def _version(seen: int | None) -> bytes:
    return b"" if seen is None else b"%d " % seen


async def _examine(servers: Servers, scripts: _Scripts) -> None:
    """Say now what would only go wrong later."""
    buckets = {await servers.of(bucket): bucket for bucket in reversed(range(BUCKETS))}
    for address, bucket in buckets.items():
        line = await servers.open(address)
        try:
            (info,) = await line.ask([("INFO",)])
            _check_server(address, servers.options.topology, info)
            _check_answers(address, servers.options.topology, await line.ask(scripts.dry_run(bucket)))
        finally:
            await line.close()
    await _check_format(servers)


def _check_server(address: Address, topology: Topology, info: Reply) -> None:
    if not isinstance(info, bytes):
        logger.warning(
            "Redis at %s does not say its version and eviction policy (%s); see docs/how-to/redis.md", shown(address), info
        )
        return
    facts = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
    if refusal := _refusal(topology, facts):
        raise StorageError(f"Redis at {shown(address)}: {refusal}")


def _refusal(topology: Topology, facts: Mapping[str, str]) -> str | None:
    version = facts.get("redis_version", "")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    policy = facts.get("maxmemory_policy", "noeviction")
    if numbers < _OLDEST:
        return f"version {version} is too old; use Redis 7.0 or newer, or Valkey"
    mode = facts.get("server_mode") or facts.get("redis_mode")  # Valkey's name for it, and Redis's
    if mode == "sentinel":
        return "it is a sentinel; use redis+sentinel://HOST:PORT/PRIMARY"
    if mode == "cluster" and topology != "cluster":
        return "it is a node of a cluster; use redis+cluster://HOST:PORT"
    if facts.get("role") == "slave" and topology == "single":
        return "it is a replica, and takes no writes; use the primary's address, or redis+sentinel://HOST:PORT/PRIMARY"
    if facts.get("maxmemory", "0") != "0" and policy != "noeviction":
        return f"it evicts keys when its memory is full ({policy}), and so would lose streams; CONFIG SET maxmemory-policy noeviction"
    return None


def _check_answers(address: Address, topology: Topology, replies: Sequence[Reply]) -> None:
    flat = [reply for some in replies for reply in (some if isinstance(some, list) else [some])]
    if topology == "cluster" and any(isinstance(reply, (AskError, TryAgainError)) for reply in flat):
        return  # the slot is being moved just now
    for reply in flat:
        # A server without memory can still be read.
        if isinstance(reply, ResponseError) and not isinstance(reply, OutOfMemoryError):
            raise translated(address, reply)


async def _check_format(servers: Servers) -> None:
    key, pipelines = servers.tag(0) + _FORMAT_KEY, Pipelines(servers)
    try:
        (found,) = await pipelines.run([Request(0, ("SET", key, _FORMAT, "NX", "GET"))])
        if isinstance(found, StorageFullError):
            (found,) = await pipelines.run([Request(0, ("GET", key))])
    finally:
        await pipelines.close()
    if isinstance(found, StorageError):
        raise found
    if found not in {None, _FORMAT}:
        raise StorageCorruptError(
            f"{servers.options.name}: what is under this prefix was written by a newer streamkeep or a much older one, or is not its own"
        )
