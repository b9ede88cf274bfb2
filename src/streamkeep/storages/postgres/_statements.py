"""What PostgresStorage says to PostgreSQL: the statements that read, change and scan.

Knows nothing of callers and doorbells. What keeps it right:

- *One statement, one moment.* Under READ COMMITTED, which is asked for where a server's default is another, each statement sees what was
  committed before it began, and an UPDATE that waited for another one's row looks again at the version. Head and records are read by
  one statement, and a batch of commits is one statement and so one transaction.
- *Rows are locked in the order of the ids*, as far as the planner keeps to it: it is told to look ids up one by one. Two processes that
  commit the same streams wait for each other in one direction only. If they do deadlock, the one that PostgreSQL picks tries again.
- *A key never comes back*, so records whose stream was deleted can belong to no other.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from streamkeep.errors import StorageError
from streamkeep.storage import PAGE_BYTES, Head, Page
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages.postgres._errors import is_conflict
from streamkeep.storages.postgres._link import SECONDS, Link, Place, connect
from streamkeep.storages.postgres._schema import prepare

T = TypeVar("T")

_BYTES_A_SECOND: Final = 1 << 20  # at least, while a commit is sent and stored
_TRIES: Final = 10
_MOST_RECORDS: Final = 10_000
_LEAST_PAGE_BYTES: Final = 64 << 10
_SHORT_LOG: Final = 64

_READ: Final = """
    SELECT s.version, s.tail, s.state, s.expires_at, s."first", CASE WHEN a."limit" > 0 AND a.start >= s."first" THEN ARRAY(
        SELECT p.data FROM (
            SELECT r.data, r."offset", sum(octet_length(r.data)) OVER (ORDER BY r."offset") - octet_length(r.data) AS before,
                row_number() OVER (ORDER BY r."offset") - 1 AS number
            FROM {schema}.records r
            WHERE r.stream = s.key AND r."offset" >= a.start
            ORDER BY r."offset" LIMIT a."limit"
        ) p WHERE p.before < $4::bigint AND p."offset" = a.start + p.number ORDER BY p."offset"
    ) END AS records
    FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS a(id, start, "limit", n)
    LEFT JOIN {schema}.streams s ON s.id = a.id
    ORDER BY a.n
"""

# Both give the ids of the commits that took effect. There are no joins but of an id with its row: the planner takes every array to be of
# ten rows, and would compare each of five hundred with each. What a log forgets is looked for from where it began before: what it has
# forgotten earlier is in the index until there is a vacuum, and would be passed over again by each commit.
_COMMIT: Final = """
    WITH asked AS MATERIALIZED (
        SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bytea[], $6::double precision[], $7::bigint[])
            AS a(id, seen, version, tail, state, expires_at, "first")
    ), oldest AS MATERIALIZED (
        SELECT ARRAY(
            SELECT CASE WHEN a."first" > 0 THEN (SELECT s."first" FROM {schema}.streams s WHERE s.id = a.id) END
            FROM asked a ORDER BY a.id
        ) AS firsts
    ), replaced AS (
        UPDATE {schema}.streams s
        SET version = a.version, tail = a.tail, state = a.state, expires_at = a.expires_at, "first" = a."first"
        FROM asked a WHERE s.id = a.id AND s.version = a.seen
        RETURNING s.id, s.key
    ), created AS (
        INSERT INTO {schema}.streams (id, version, tail, state, expires_at, "first")
        SELECT id, version, tail, state, expires_at, "first" FROM asked WHERE seen IS NULL ORDER BY id
        ON CONFLICT (id) DO NOTHING
        RETURNING id, key
    ), done AS MATERIALIZED (
        SELECT id, key FROM replaced UNION ALL SELECT id, key FROM created
    ), outcome AS MATERIALIZED (
        SELECT ARRAY(
            SELECT max(key) FROM (SELECT id, 0 AS key FROM asked UNION ALL SELECT id, key FROM done) AS each GROUP BY id ORDER BY id
        ) AS keys
    ), stored AS (
        INSERT INTO {schema}.records (stream, "offset", data)
        SELECT o.keys[r.n], r."offset", r.data
        FROM outcome o, unnest($8::integer[], $9::bigint[], $10::bytea[]) AS r(n, "offset", data) WHERE o.keys[r.n] > 0
    ), forgotten AS (
        DELETE FROM {schema}.records r USING outcome o, oldest b, unnest($11::integer[], $12::bigint[]) AS f(n, "first")
        WHERE r.stream = o.keys[f.n] AND r."offset" >= b.firsts[f.n] AND r."offset" < f."first"
    )
    SELECT array_agg(id), CASE WHEN $13::text IS NOT NULL AND count(*) > 0 THEN pg_notify($13, $14::text)::text END FROM done
"""

# For what writers do nearly always: each commit replaces a head, brings one record or none, and no record of the log was ever forgotten.
# It takes a third less time.
_APPEND: Final = """
    WITH done AS (
        UPDATE {schema}.streams s
        SET version = a.version, tail = a.tail, state = a.state, expires_at = a.expires_at
        FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bytea[], $6::double precision[], $7::bytea[])
            AS a(id, seen, version, tail, state, expires_at, data)
        WHERE s.id = a.id AND s.version = a.seen
        RETURNING s.id, s.key, a.tail - 1 AS "offset", a.data
    ), stored AS (
        INSERT INTO {schema}.records (stream, "offset", data)
        SELECT key, "offset", data FROM done WHERE data IS NOT NULL
    )
    SELECT array_agg(id), CASE WHEN $8::text IS NOT NULL AND count(*) > 0 THEN pg_notify($8, $9::text)::text END FROM done
"""

# The records of long logs go in statements of their own, none of which takes long.
_DELETE: Final = """
    WITH gone AS (
        DELETE FROM {schema}.streams s USING unnest($1::bytea[], $2::bigint[]) AS a(id, seen)
        WHERE s.id = a.id AND s.version = a.seen RETURNING s.id, s.key, s.tail, s."first"
    ), emptied AS (
        DELETE FROM {schema}.records r USING gone g
        WHERE r.stream = g.key AND g.tail - g."first" <= $3::bigint AND r."offset" >= g."first" AND r."offset" < g."first" + $3::bigint
    ), notified AS MATERIALIZED (
        SELECT CASE WHEN $4::text IS NOT NULL AND count(*) > 0 THEN pg_notify($4, $5::text)::text END AS done FROM gone
    )
    SELECT g.id, g.key, g.tail, g."first", n.done FROM gone g CROSS JOIN notified n
"""
_DELETE_RECORDS: Final = """
    DELETE FROM {schema}.records r USING unnest($1::bigint[], $2::bigint[]) AS a(stream, first)
    WHERE r.stream = a.stream AND r."offset" >= a.first AND r."offset" < a.first + $3::bigint
"""
_SCAN: Final = """
    SELECT id, version, tail, state, expires_at, "first" FROM {schema}.streams WHERE id > $1::bytea ORDER BY id LIMIT $2::bigint
"""
_EXPIRED: Final = """
    SELECT id, version, tail, state, expires_at, "first" FROM {schema}.streams
    WHERE expires_at <= $1::double precision ORDER BY expires_at LIMIT $2::bigint
"""
_TIME: Final = "SELECT extract(epoch FROM clock_timestamp())::double precision"
_CHANGED: Final = """
    SELECT a.id, s.version FROM unnest($1::bytea[], $2::bigint[]) AS a(id, version)
    LEFT JOIN {schema}.streams s ON s.id = a.id WHERE s.version IS DISTINCT FROM a.version
"""


class Commit(msgspec.Struct, frozen=True):
    """What `Storage.commit` was asked."""

    id: bytes
    seen: int | None
    head: Head
    records: Sequence[bytes]

    @property
    def size(self) -> int:
        """How many bytes it brings."""
        return len(self.head.state) + sum(map(len, self.records))


class Deletion(msgspec.Struct, frozen=True):
    """What `Storage.delete` was asked."""

    id: bytes
    seen: int
    size: ClassVar = 0


Change = Commit | Deletion
Ring = tuple[str, str]
"""A channel and what to say in it."""


class Reading(msgspec.Struct, frozen=True):
    """What `Storage.read` was asked."""

    id: bytes
    start: int
    limit: int


class Session:
    """One connection, which is made when it is needed, and made anew when it was lost; for one task at a time.

    Every error is a StorageError, and no statement takes much longer than five seconds. Now and then, and with each new connection, the
    server is asked for its time.
    """

    def __init__(self, place: Place, clock: EngineClock) -> None:
        self._place = place
        self._clock = clock
        self._link: Link | None = None

    async def aclose(self) -> None:
        """Close the connection."""
        if self._link is not None:
            await self._link.aclose()

    async def prepare(self) -> None:
        """See that the server can be used; create what is missing."""
        await self._retrying(lambda link: prepare(link, self._place))

    async def commit(self, commits: Sequence[Commit], ring: Ring | None) -> Sequence[bool]:
        """Do each `Storage.commit`, of different streams, in one transaction; ring if any took effect."""
        order = sorted(commits, key=lambda commit: commit.id)
        seconds = SECONDS + sum(commit.size for commit in commits) / _BYTES_A_SECOND
        query, columns = _statement(order)
        [(ids, _)] = await self.fetch(query, *columns, *(ring or (None, None)), seconds=seconds)
        done: set[bytes] = set(ids or ())
        return [commit.id in done for commit in commits]

    async def delete(self, deletions: Sequence[Deletion], ring: Ring | None) -> Sequence[bool]:
        """Do each `Storage.delete`, of different streams, in one transaction; ring if any took effect."""
        asked = sorted(deletions, key=lambda deletion: deletion.id)

        async def delete(link: Link) -> Sequence[bool]:
            ids, seen = [each.id for each in asked], [each.seen for each in asked]
            async with link.transaction():
                rows = await link.run(_DELETE, ids, seen, _SHORT_LOG, *(ring or (None, None)))
                logs = [(key, first, tail) for _, key, tail, first, _ in rows if tail - first > _SHORT_LOG]
                for keys, firsts in _spans(logs):
                    await link.run(_DELETE_RECORDS, keys, firsts, _MOST_RECORDS)
            gone = {id for id, *_ in rows}
            return [deletion.id in gone for deletion in deletions]

        return await self._retrying(delete)

    async def fetch(self, query: str, *arguments: object, seconds: float = SECONDS) -> Sequence[Any]:
        """Run one statement in a transaction of its own, and give its rows."""
        return await self._retrying(lambda link: link.run_alone(query, *arguments, seconds=seconds))

    async def _retrying(self, work: Callable[[Link], Awaitable[T]]) -> T:
        for _ in range(_TRIES):
            try:
                return await work(await self._connected())
            except StorageError as error:
                if not is_conflict(error):
                    raise
        return await work(await self._connected())

    async def _connected(self) -> Link:
        link = self._link
        if link is None or link.is_closed:
            link = self._link = await connect(self._place)
            await self._measure(link)
        elif self._clock.is_stale:
            await self._measure(link)
        return link

    async def _measure(self, link: Link) -> None:
        async with link.bounded():
            asked_at = self._clock.start()
            [(seconds,)] = await link.run_alone(_TIME)
            self._clock.set(seconds, asked_at)


class Reader:
    """A session that reads, for any number of tasks, one after the other."""

    def __init__(self, place: Place, clock: EngineClock) -> None:
        self._session = Session(place, clock)
        self._turn = asyncio.Lock()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._session.aclose()

    async def prepare(self) -> None:
        """See that the database can be used; create what is missing."""
        await self._session.prepare()

    async def read(self, readings: Sequence[Reading]) -> Sequence[Page | None]:
        """Do each `Storage.read`, all at one moment."""
        ids = [reading.id for reading in readings]
        starts = [reading.start for reading in readings]
        limits = [min(reading.limit, _MOST_RECORDS) for reading in readings]
        size = max(PAGE_BYTES // len(readings), _LEAST_PAGE_BYTES)
        rows = await self._fetch(_READ, ids, starts, limits, size)
        return [_page(*row) for row in rows]

    async def scan(self, after: bytes, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.scan`."""
        return _heads(await self._fetch(_SCAN, after, limit))

    async def expired(self, before: float, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.expired`."""
        return _heads(await self._fetch(_EXPIRED, before, limit))

    async def changed(self, versions: Mapping[bytes, int | None]) -> Mapping[bytes, int | None]:
        """Give the versions of those streams that have another one (None: the stream is not there)."""
        return dict(await self._fetch(_CHANGED, list(versions), list(versions.values())))

    async def _fetch(self, query: str, *arguments: object) -> Sequence[Any]:
        async with self._turn:
            return await self._session.fetch(query, *arguments)


def _heads(rows: Sequence[tuple[bytes, int, int, bytes, float, int]]) -> Sequence[tuple[str, Head]]:
    return [
        (id.decode(), Head(version, tail, state, expires_at, first)) for id, version, tail, state, expires_at, first in rows
    ]


def _page(
    version: int | None, tail: int, state: bytes, expires_at: float, first: int, records: Sequence[bytes] | None
) -> Page | None:
    return None if version is None else Page(Head(version, tail, state, expires_at, first), records or ())


def _statement(commits: Sequence[Commit]) -> tuple[str, Sequence[Sequence[object]]]:
    """Give the statement that does these commits, and what it wants to know."""
    columns: list[Sequence[object]] = [
        [commit.id for commit in commits],
        [commit.seen for commit in commits],
        [commit.head.version for commit in commits],
        [commit.head.tail for commit in commits],
        [commit.head.state for commit in commits],
        [commit.head.expires_at for commit in commits],
    ]
    if all(commit.seen is not None and len(commit.records) <= 1 and not commit.head.first for commit in commits):
        return _APPEND, [*columns, [next(iter(commit.records), None) for commit in commits]]
    numbers: list[int] = []
    offsets: list[int] = []
    records: list[bytes] = []
    for number, commit in enumerate(commits, 1):
        head = commit.head
        count = min(len(commit.records), head.tail - head.first)  # a statement does not see, and cannot delete, what it inserts
        numbers += [number] * count
        offsets += range(head.tail - count, head.tail)
        records += commit.records[len(commit.records) - count :]
    firsts = [commit.head.first for commit in commits]
    forgetting = [number for number, first in enumerate(firsts, 1) if first]
    return _COMMIT, [*columns, firsts, numbers, offsets, records, forgetting, [first for first in firsts if first]]


def _spans(logs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut logs, given as keys and the offsets from and to which they go, into keys and offsets to begin at; each pair of lists is at most
    some ten thousand records.
    """
    keys: list[int] = []
    firsts: list[int] = []
    size = 0
    for key, begin, tail in logs:
        for first in range(begin, tail, _MOST_RECORDS):
            keys.append(key)
            firsts.append(first)
            size += min(tail - first, _MOST_RECORDS)
            if size >= _MOST_RECORDS:
                yield keys, firsts
                keys, firsts, size = [], [], 0
    if keys:
        yield keys, firsts
