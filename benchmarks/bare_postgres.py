"""PostgreSQL by asyncpg alone, as one would write it by hand: a statement a batch, with a head and a record for each commit in it."""

import asyncio
import time
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no types

from benchmarks.bare import STATE, encode

CHUNK = {"text": "x" * 130}

_TABLES = """
    DROP TABLE IF EXISTS bare_heads, bare_records;
    CREATE TABLE bare_heads (key bigint PRIMARY KEY, version bigint, tail bigint, state bytea, expires_at float8) WITH (fillfactor = 50);
    CREATE TABLE bare_records (stream bigint, "offset" bigint, data bytea, PRIMARY KEY (stream, "offset"));
"""
_APPEND = """
    WITH done AS (
        UPDATE bare_heads h SET version = a.seen + 1, tail = a.seen + 1, state = a.state, expires_at = a.expires_at
        FROM unnest($1::bigint[], $2::bigint[], $3::bytea[], $4::float8[], $5::bytea[]) a(key, seen, state, expires_at, data)
        WHERE h.key = a.key AND h.version = a.seen RETURNING h.key, a.seen, a.data
    ), stored AS (INSERT INTO bare_records SELECT key, seen, data FROM done)
    SELECT key FROM done
"""
_PAGE = 'SELECT "offset", data FROM bare_records WHERE stream = 0 AND "offset" >= $1 ORDER BY "offset" LIMIT 512'


class Bare:
    """One connection that writes, and one that listens and reads."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)._replace(query="").geturl()

    async def __aenter__(self) -> Self:
        self._writer: Any = await asyncpg.connect(self._url)
        self._reader: Any = await asyncpg.connect(self._url)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._writer.close()
        await self._reader.close()

    async def append(self, writers: int, each: int) -> float:
        """Give how many commits a second so many writers make, if a batch is one commit of each."""
        await self._begin(writers)
        began = time.perf_counter()
        for seen in range(each):
            await self._commit(writers, seen)
        return writers * each / (time.perf_counter() - began)

    async def replay(self, count: int) -> float:
        """Give how many records a second are read, a page of 512 at a time."""
        await self._begin(1)
        await self._writer.execute(
            f"INSERT INTO bare_records SELECT 0, n, '\\x{encode(CHUNK).hex()}' FROM generate_series(0, {count - 1}) n"
        )
        began = time.perf_counter()
        for start in range(0, count, 512):
            assert await self._reader.fetch(_PAGE, start)
        return count / (time.perf_counter() - began)

    async def deliver(self, count: int) -> list[float]:
        """Give the seconds from each write until a connection that listens has read it."""
        await self._begin(1)
        rung = asyncio.Event()
        await self._reader.add_listener("bare", lambda *_: rung.set())
        seconds: list[float] = []
        for seen in range(count):
            rung.clear()
            began = time.perf_counter()
            writing = asyncio.create_task(self._commit_and_notify(seen))
            await rung.wait()
            assert await self._reader.fetch(_PAGE, seen)
            seconds.append(time.perf_counter() - began)
            await writing
        await self._reader.reset()
        return seconds

    async def _begin(self, writers: int) -> None:
        await self._writer.execute(_TABLES)
        await self._writer.execute(f"INSERT INTO bare_heads SELECT n, 0, 0, '', 0 FROM generate_series(0, {writers - 1}) n")

    async def _commit(self, writers: int, seen: int, query: str = _APPEND) -> None:
        now = time.time()
        data = [encode(CHUNK) for _ in range(writers)]
        done = await self._writer.fetch(query, list(range(writers)), [seen] * writers, [STATE] * writers, [now] * writers, data)
        assert len(done) == writers

    async def _commit_and_notify(self, seen: int) -> None:
        await self._commit(1, seen, _APPEND.replace("SELECT key FROM done", "SELECT key, pg_notify('bare', '') FROM done"))
