"""Connections to PostgreSQL: straight to the server, or by way of a pooler; with an end to every wait, and errors that are ours."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from streamkeep.errors import StorageError, StorageUnavailableError
from streamkeep.storages._forks import keep_from_children
from streamkeep.storages.postgres._errors import asyncpg, translated

SECONDS: Final = 5

_RUNS_A_PLAN: Final = 100
"""So often a statement is run before it is planned again, which costs half a millisecond."""

# A table that was nearly empty when it was last analysed is read as a whole by the planner, and a moment later it holds a million rows.
# So it is told to look rows up one by one; where it reads a few all the same, the plan is not kept for long. A wait that the server ends
# itself leaves no statement behind that takes effect later.
_SETTINGS: Final = """
    {set} enable_seqscan = off; {set} enable_hashjoin = off; {set} enable_mergejoin = off; {set} enable_material = off; {set} jit = off;
    {set} lock_timeout = '4s'; {set} idle_in_transaction_session_timeout = '10s';
"""
_SESSION: Final = (
    _SETTINGS.format(set="SET")
    + "SET plan_cache_mode = force_generic_plan; SET default_transaction_isolation = 'read committed'"
)
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED; " + _SETTINGS.format(set="SET LOCAL")


class Prepared(Protocol):
    """A statement that the server has parsed and planned."""

    async def fetch(self, *args: object) -> Sequence[Any]:
        """Run it, and give its rows."""
        ...


class Database(Protocol):
    """What is used here of a connection of asyncpg, which has no types."""

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """Run one statement, and give its rows."""
        ...

    async def execute(self, query: str) -> str:
        """Run statements that give nothing."""
        ...

    async def prepare(self, query: str, *, name: str) -> Prepared:
        """Have a statement parsed and planned; kept until nobody has it, or the session ends."""
        ...

    async def add_listener(self, channel: str, callback: Callable[[object, int, str, str], None]) -> None:
        """Call back for each notification in a channel."""
        ...

    def add_termination_listener(self, callback: Callable[[object], None]) -> None:
        """Call back when the connection has ended."""
        ...

    def is_closed(self) -> bool:
        """Say whether the connection has ended."""
        ...

    def terminate(self) -> None:
        """End the connection; whoever waits for an answer gets an error."""
        ...

    async def close(self, *, timeout: float) -> None:  # noqa: ASYNC109 - asyncpg's
        """End the connection in good order."""
        ...

    def get_server_pid(self) -> int:
        """Give the process that the server said it would be."""
        ...

    def get_server_version(self) -> tuple[int, ...]:
        """Give the server's version."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where streams are kept: a URL for each host, the first one that can be written to is used; and a schema."""

    urls: Sequence[str]
    schema: str
    notify: bool

    def __str__(self) -> str:
        """Name it without what may be secret."""
        return f"PostgreSQL, schema {self.schema}"

    @property
    def quoted(self) -> str:
        """The schema, as SQL has it."""
        return '"' + self.schema.replace('"', '""') + '"'

    def sql(self, statement: str) -> str:
        """Put the schema into a statement."""
        return statement.replace("{schema}", self.quoted)


class Link:
    """A connection of this process's own, which has ended when `is_closed`.

    A pooler in transaction mode may run two statements in two sessions, and gives to others what was left in one. So by way of a pooler
    nothing is left: no settings, and nothing prepared. Even one statement is two messages, to prepare and to run it, so there each has
    a transaction.
    """

    def __init__(self, db: Database, place: Place, *, is_pooled: bool) -> None:
        self.db: Final = db
        self.is_pooled: Final = is_pooled
        self._place = place
        self._prepared: dict[str, Prepared] = {}
        self._runs = 0

    @property
    def is_closed(self) -> bool:
        """Say whether it has ended."""
        return self.db.is_closed()

    @asynccontextmanager
    async def bounded(self, seconds: float = SECONDS) -> AsyncGenerator[None]:
        """Let no error out of this block that is not one of ours; end the connection if it takes too long, or may be in any state."""
        async with _bounded(self.db, self._place, seconds):
            yield

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        """Commit what is done in this block, or nothing."""
        async with self.bounded():
            await self.db.execute(_BEGIN if self.is_pooled else "BEGIN")
        try:
            yield
        except BaseException:
            if not self.is_closed:
                async with self.bounded():
                    await self.db.execute("ROLLBACK")
            raise
        async with self.bounded():
            await self.db.execute("COMMIT")

    async def run(self, query: str, *arguments: object, seconds: float = SECONDS) -> Sequence[Any]:
        """Run one statement in the transaction that there is, and give its rows."""
        async with self.bounded(seconds):
            if self.is_pooled:
                return await self.db.fetch(self._place.sql(query), *arguments)
            return await (await self._prepare(query)).fetch(*arguments)

    async def run_alone(self, query: str, *arguments: object, seconds: float = SECONDS) -> Sequence[Any]:
        """Run one statement in a transaction of its own, and give its rows."""
        if not self.is_pooled:
            return await self.run(query, *arguments, seconds=seconds)
        async with self.transaction():
            return await self.run(query, *arguments, seconds=seconds)

    async def _prepare(self, query: str) -> Prepared:
        self._runs += 1
        if self._runs % _RUNS_A_PLAN == 0:
            self._prepared.clear()
        if query not in self._prepared:
            # Only what has a name is kept by the server.
            self._prepared[query] = await self.db.prepare(self._place.sql(query), name=f"streamkeep_{self._runs}")
        return self._prepared[query]

    async def aclose(self) -> None:
        """Close it; a server that does not answer is not told."""
        with suppress(Exception):
            await self.db.close(timeout=SECONDS)
        with suppress(Exception):
            self.db.terminate()


async def connect(place: Place) -> Link:
    """Connect to the first host that can be written to."""
    error = StorageError(f"{place}: there is no host")
    for url in place.urls:
        try:
            return await _connect(url, place)
        except StorageError as failure:
            error = failure
    raise error


async def _connect(url: str, place: Place) -> Link:
    try:
        db: Database = await asyncpg.connect(
            url,
            timeout=SECONDS,
            statement_cache_size=0,
            target_session_attrs="read-write",
            server_settings={"application_name": "streamkeep"},
        )
    except Exception as error:
        raise translated(error, place) from error
    transport: asyncio.BaseTransport | None = getattr(db, "_transport", None)  # asyncpg gives it to nobody
    if transport is not None:
        keep_from_children(db, transport.get_extra_info("socket"))
    async with _bounded(db, place, SECONDS):
        # A pooler makes up a process to name to each client. While it is not known there must be no trace of the question.
        await db.execute("BEGIN")
        [(pid,)] = await db.fetch("SELECT pg_backend_pid()")
        await db.execute("COMMIT")
        is_pooled: bool = pid != db.get_server_pid()
        if not is_pooled:
            await db.execute(_SESSION)
    return Link(db, place, is_pooled=is_pooled)


@asynccontextmanager
async def _bounded(db: Database, place: Place, seconds: float) -> AsyncGenerator[None]:
    # Not a timeout of asyncpg's: that one asks the server to cancel, and waits for a server that does not answer.
    watchdog = asyncio.get_running_loop().call_later(seconds, db.terminate)
    try:
        yield
    except Exception as error:
        failure = translated(error, place)
        if isinstance(failure, StorageUnavailableError):
            db.terminate()
        raise failure from error
    except BaseException:
        db.terminate()
        raise
    finally:
        watchdog.cancel()
