"""A URL names a storage, or the error says which ones do."""

from pathlib import Path

import anyio
import pytest

from streamkeep.errors import InvalidArgumentError
from streamkeep.storages import storage_for
from streamkeep.storages.memory import MemoryStorage


def test_memory_names_a_storage_of_its_own() -> None:
    assert isinstance(storage_for("memory://"), MemoryStorage)
    assert storage_for("memory://") is not storage_for("memory://")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///streams.db", "streams.db"),
        ("sqlite:///a/b.db", "a/b.db"),
        ("sqlite:///{tmp}/streams.db", "{tmp}/streams.db"),
        ("sqlite:////{tmp}/streams.db", "{tmp}/streams.db"),
        ("sqlite://///{tmp}/streams.db", "{tmp}/streams.db"),
        ("sqlite:///a/../%FF.db", "\udcff.db"),
        ("sqlite:///100%25%20%3F.db", "100% ?.db"),
        ("sqlite:///streams.db?synchronous=NORMAL", "streams.db"),
        ("sqlite:///streams.db?synchronous=FULL", "streams.db"),
    ],
)
def test_sqlite_names_a_file(url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    absolute = tmp_path / "absolute"
    absolute.mkdir()

    async def open_it() -> None:
        async with storage_for(url.format(tmp=absolute)):
            pass

    anyio.run(open_it)
    assert Path(path.format(tmp=absolute)).stat().st_size > 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "streams.db",
        "/tmp/streams.db",
        "mongodb://localhost",
        "memory",
        "memory://host",
        "memory:///x",
        "memory://?x=1",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite://streams.db",
        "sqlite:///:memory:",
        "sqlite:///streams.db?synchronous=OFF",
        "sqlite:///streams.db?synchronous=",
        "sqlite:///streams.db?timeout=5",
        "sqlite:///streams.db?synchronous=FULL&synchronous=NORMAL",
        "sqlite:///streams.db#x",
    ],
)
def test_anything_else_is_refused_and_the_known_ones_are_named(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"memory://, sqlite:///relative\.db"):
        storage_for(url)


@pytest.mark.parametrize(
    "url", ["sqlite:///streams.db?timeout=5", "sqlite://streams.db", "memory://host", "nats://host?replica=3"]
)
def test_of_a_known_storage_the_mistake_is_behind_the_scheme(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^what follows '{url.partition('//')[0]}//' names no storage"):
        storage_for(url)


def test_of_another_storage_the_scheme_is_the_mistake() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^'mongodb://\.\.\.' names no storage"):
        storage_for("mongodb://localhost")
