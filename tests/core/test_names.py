"""What names are called in a storage, and what they say: the pure rules."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkeep import InvalidArgumentError, StorageCorruptError
from streamkeep._lifecycle import AFTER_RESERVED, FORGET_OPEN_SECONDS, Beginning, Life, begin, finish
from streamkeep._manager import STREAM_ID
from streamkeep._names import (
    MAX_ID,
    MAX_OWNER,
    MAX_TEXT,
    Kind,
    checked_owner,
    checked_text,
    escaped,
    is_name,
    keep,
    name_id,
    name_of,
    named_by,
    names_for,
    names_of,
    naming,
    text_in,
)
from streamkeep.storage import Head

NOW = 1_800_000_000.0
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
EVERY_ASCII = "".join(map(chr, range(128)))


def stream(owner: str = "ann", key: str = "chat", run: str = "r1", writer: str = "w1") -> Life:
    return begin(NOW, "session", writer, Beginning(300.0, {}, owner, key, run))


@settings(deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=10))
def test_ids_have_the_order_of_keys_and_their_prefixes(keys: list[str]) -> None:
    keys = sorted(set(keys))
    assert all(name_id("o", Kind.KEY, a) < name_id("o", Kind.KEY, b) for a, b in pairwise(keys))
    for one in keys:
        for other in keys:
            assert name_id("o", Kind.KEY, one).startswith(names_of("o", Kind.KEY, other)) == one.startswith(other)
            assert name_id("o", Kind.KEY, one) > names_of("o", Kind.KEY, one)


@pytest.mark.parametrize("text", [EVERY_ASCII, "chat-1", "ä", "\U0010ffff", "~", "{", "\x7f\x80"])
def test_what_an_id_was_made_of_is_read_from_it(text: str) -> None:
    assert text_in(name_id("o", Kind.KEY, text[:60])) == text[:60]
    assert text_in(name_id("o", Kind.KEY, text[60:] or "x")) == (text[60:] or "x")
    assert escaped("ab-9") == "ab-9"


def test_ids_are_told_apart_by_kind_owner_and_text() -> None:
    ids = {name_id(owner, kind, text) for owner in ("", "a", "b") for kind in Kind for text in ("a", "b")}
    assert len(ids) == 18
    assert all(is_name(id) and id < AFTER_RESERVED for id in ids)
    assert not any(map(is_name, (".session.x", "a", "key.")))


@pytest.mark.parametrize("length", [1, MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 255])
def test_a_stream_of_any_id_has_a_name_by_its_owner(length: int) -> None:
    id = "a" * (length - 1) + "b"
    name = name_id("o", Kind.OWN, id)
    assert STREAM_ID.fullmatch(id)
    assert len(name) <= MAX_ID
    assert name_id("o", Kind.OWN, text_in(name)) == name
    assert name != name_id("o", Kind.OWN, "a" * length)


def test_a_stream_has_the_names_it_was_given() -> None:
    assert names_for("s", stream().state) == [
        name_id("ann", Kind.RUN, "r1"),
        name_id("ann", Kind.KEY, "chat"),
        name_id("ann", Kind.OWN, "s"),
    ]
    assert names_for("s", stream("", "", "").state) == []
    assert names_for("s", stream("", "chat", "").state) == [name_id("", Kind.KEY, "chat")]


@pytest.mark.parametrize("text", ["", "\ud800", "a" * (MAX_TEXT + 1), "é" * (MAX_TEXT // 5 + 1), None, 7])
def test_keys_and_runs_that_are_refused(text: str) -> None:
    for what in ("key", "run"):
        with pytest.raises(InvalidArgumentError, match=what):
            checked_text(what, text)


@pytest.mark.parametrize("text", ["a" * MAX_TEXT, "é" * (MAX_TEXT // 5), " ", "\0", "/chats/1?x=y"])
def test_keys_that_are_taken(text: str) -> None:
    checked_text("key", text)
    checked_text("key", "", may_be_empty=True)
    assert len(name_id("o", Kind.KEY, text)) <= MAX_ID


@pytest.mark.parametrize("owner", ["\ud800", "a" * (MAX_OWNER + 1), None, 7])
def test_owners_that_are_refused(owner: str) -> None:
    with pytest.raises(InvalidArgumentError, match="owner"):
        checked_owner(owner)


def test_a_name_names_one_life_of_a_stream_until_that_has_expired() -> None:
    life = stream()
    head = naming(None, "s", life, NOW)
    name = name_of(head)

    assert (name.stream, named_by(name, life.head, NOW)) == ("s", life)
    assert named_by(name, None, NOW) is None
    assert named_by(name, stream(writer="w2").head, NOW) is None
    ended = finish(life, NOW)
    assert named_by(name, ended.head, NOW + 299) == ended
    assert named_by(name, ended.head, NOW + 300) is None


def test_a_name_outlives_its_stream_and_is_kept_when_that_is() -> None:
    first = naming(None, "s", stream(), NOW)
    second = naming(first, "t", stream(writer="w2"), NOW)
    kept = keep(second, NOW + 10)

    assert first.expires_at == NOW + 2 * FORGET_OPEN_SECONDS + 300
    assert first.version < second.version < kept.version
    assert name_of(kept) == name_of(second)
    assert kept.expires_at == second.expires_at + 10


@pytest.mark.parametrize("state", [b"", b"{}", b"[1]", b"\xff"])
def test_what_is_no_name_is_damaged(state: bytes) -> None:
    with pytest.raises(StorageCorruptError):
        name_of(Head(1, 0, state, 0.0))
