"""The tables of PostgresStorage, and how they come into being while any number of processes, newer and older ones, start and run."""

from typing import Final

from streamkeep.errors import StorageCorruptError, StorageError
from streamkeep.storages.postgres._link import Database, Link, Place

_OLDEST_SERVER: Final = 12
_MIGRATION_SECONDS: Final = 60

FORMAT: Final = 3
"""The format that this code writes. A format may only add what older code need not know; one that does more raises OLDEST_FORMAT too."""
OLDEST_FORMAT: Final = 1
"""The oldest format whose code may still work on what this code writes."""

# An id is kept as its UTF-8 bytes: their order is that of the code points, whatever the database's encoding and collation.
# Half of each page of heads is left free, and no index has what most commits change, so that a new version of a row finds room beside the
# old one and no index is touched ("HOT"): expires_at has an index, but it changes seldom. Heads are few and change all the time: vacuum
# them early. Records never change.
_SCHEMA: Final = """
    CREATE TABLE {schema}.format (
        version integer NOT NULL,
        oldest  integer NOT NULL -- code that knows no newer format than this may not work here
    );
    CREATE TABLE {schema}.streams (
        key        bigint           GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id         bytea            NOT NULL UNIQUE, -- UTF-8
        version    bigint           NOT NULL,
        tail       bigint           NOT NULL,
        state      bytea            NOT NULL,
        expires_at double precision NOT NULL
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
    CREATE TABLE {schema}.records (
        stream   bigint NOT NULL, -- streams.key
        "offset" bigint NOT NULL,
        data     bytea  NOT NULL,
        PRIMARY KEY (stream, "offset")
    ) WITH (autovacuum_vacuum_scale_factor = 0.05);
"""
_ADDED_IN_2: Final = "CREATE INDEX IF NOT EXISTS streams_expires_at ON {schema}.streams (expires_at)"
_ADDED_IN_3: Final = 'ALTER TABLE {schema}.streams ADD COLUMN IF NOT EXISTS "first" bigint NOT NULL DEFAULT 0'

_ADD_FORMAT: Final = "INSERT INTO {schema}.format VALUES ($1::integer, $2::integer)"
_SET_FORMAT: Final = "UPDATE {schema}.format SET version = $1::integer, oldest = $2::integer"
_FORMAT_OF: Final = "SELECT version, oldest FROM {schema}.format"
_MISSING: Final = """
    SELECT p || ' on ' || t FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p, unnest(ARRAY['streams', 'records']) t
    WHERE NOT has_table_privilege($1::text || '.' || t, p)
"""


async def prepare(link: Link, place: Place) -> None:
    """See that the database can be used; create what is missing."""
    db = link.db
    if link.is_pooled and place.notify:
        raise StorageError(
            f"{place}: before the server is a pooler, and notifications may not pass it; add notify=off to the URL"
        )
    if db.get_server_version()[0] < _OLDEST_SERVER:
        raise StorageError(
            f"{place}: the server is version {db.get_server_version()[0]}; upgrade it to {_OLDEST_SERVER} or newer"
        )
    async with link.transaction(), link.bounded(_MIGRATION_SECONDS):
        await _migrate(db, place)
        missing = [row[0] for row in await db.fetch(_MISSING, place.quoted)]
    if missing:
        raise StorageError(
            f"{place}: this role lacks {', '.join(missing)}; as their owner run"
            f" GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {place.quoted} TO this role"
        )


async def _migrate(db: Database, place: Place) -> None:
    """Create what is missing. Any number of processes may come at once: they go one by one, and the first one does it."""
    if (await _format(db, place)) >= FORMAT:
        return
    await db.fetch("SELECT set_config('lock_timeout', $1::text, true)", f"{_MIGRATION_SECONDS}s")
    await db.fetch("SELECT pg_advisory_xact_lock(hashtextextended('streamkeep ' || $1::text, 0))", place.schema)
    version = await _format(db, place)
    if version >= FORMAT:
        return
    if version == 0:
        await _create(db, place)
    await db.execute(place.sql(_ADDED_IN_2))
    await db.execute(place.sql(_ADDED_IN_3))
    await db.fetch(place.sql(_ADD_FORMAT if version == 0 else _SET_FORMAT), FORMAT, OLDEST_FORMAT)


async def _create(db: Database, place: Place) -> None:
    [(exists,)] = await db.fetch("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1::name)", place.schema)
    if not exists:  # IF NOT EXISTS would want the right to create it also where it exists
        await db.execute(f"CREATE SCHEMA {place.quoted}")
    await db.execute(place.sql(_SCHEMA))


async def _format(db: Database, place: Place) -> int:
    """Give the format that is there; 0 if none is."""
    tables = await db.fetch("SELECT FROM pg_tables WHERE schemaname = $1::name AND tablename = 'format'", place.schema)
    if not tables:
        return 0
    formats = await db.fetch(place.sql(_FORMAT_OF))
    if len(formats) != 1:
        raise StorageCorruptError(f"{place}: its table 'format' is not streamkeep's; use another schema")
    version, oldest = formats[0]
    if oldest > FORMAT:
        raise StorageCorruptError(
            f"{place}: was written by a newer streamkeep (format {version}, this one knows {FORMAT}); upgrade streamkeep"
        )
    return int(version)
