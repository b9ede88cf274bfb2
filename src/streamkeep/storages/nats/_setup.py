"""The JetStream stream that keeps our streams: created if it is missing, and checked, for a wrong setting would lose what is promised."""

from collections.abc import Mapping
from typing import Any, Final

from streamkeep.errors import StorageCorruptError, StorageError
from streamkeep.storages.nats._link import NO_STREAM, ApiError, Connection

_FORMAT: Final = 1

_NEEDED: Final[Mapping[str, object]] = {
    "retention": "limits",
    "storage": "file",
    "discard": "new",
    "allow_direct": True,
    "allow_atomic": True,
    "allow_rollup_hdrs": True,
}
_FORBIDDEN: Final = ("mirror", "sources", "subject_transform", "sealed", "deny_purge", "no_ack")


async def prepare(connection: Connection, name: str, replicas: int | None) -> dict[str, Any]:
    """Create the JetStream stream if it is missing, check it, and give what JetStream says of it."""
    try:
        info = await connection.api(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.code != NO_STREAM:
            raise
        info = await _create(connection, name, replicas)
    _check(info["config"], name, replicas)
    return info


async def _create(connection: Connection, name: str, replicas: int | None) -> dict[str, Any]:
    config = {
        "name": name,
        "description": "streams of streamkeep: one subject each",
        "subjects": [f"{name}.s.*", f"{name}.due.>"],
        "num_replicas": replicas or 1,
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_consumers": -1,
        "metadata": {"streamkeep": str(_FORMAT)},
        "republish": {"src": f"{name}.>", "dest": f"{name}.bell.>", "headers_only": True},
        **_NEEDED,
    }
    try:
        return await connection.api(f"STREAM.CREATE.{name}", config)
    except ApiError:
        # Another process may have created it in the same moment, with other limits.
        try:
            return await connection.api(f"STREAM.INFO.{name}")
        except ApiError as error:
            if error.code != NO_STREAM:
                raise
        raise


def _check(config: Mapping[str, Any], name: str, replicas: int | None) -> None:
    """Raise StorageError if JetStream would not keep what is promised."""
    written_by = config.get("metadata", {}).get("streamkeep", str(_FORMAT))
    if written_by != str(_FORMAT):
        raise StorageCorruptError(
            f"the JetStream stream {name} has format {written_by}, and this streamkeep knows {_FORMAT}: upgrade it"
        )
    wrong = [
        f"{key} is {config.get(key)!r} and must be {value!r}" for key, value in _NEEDED.items() if config.get(key) != value
    ]
    wrong += [f"{key} is set and must not be" for key in _FORBIDDEN if config.get(key)]
    wrong += [
        f"{key} is {config[key]} and must be unlimited" for key in ("max_age", "max_msgs_per_subject") if config.get(key, 0) > 0
    ]
    subjects = (f"{name}.s.*", f"{name}.due.>")
    wrong += [f"subjects must hold {subject}" for subject in subjects if subject not in config.get("subjects", ())]
    republish = config.get("republish") or {}
    if (republish.get("src"), republish.get("dest")) != (f"{name}.>", f"{name}.bell.>"):
        wrong.append(f"republish must send {name}.> to {name}.bell.>")
    if replicas is not None and config.get("num_replicas") != replicas:
        wrong.append(f"num_replicas is {config.get('num_replicas')} and the URL says {replicas}")
    if wrong:
        raise StorageError(
            f"the JetStream stream {name} cannot keep streams: {'; '.join(wrong)}. Change it with 'nats stream edit {name}', or name "
            "another one with ?stream="
        )
