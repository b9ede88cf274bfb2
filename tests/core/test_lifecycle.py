from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from streamkeep import (
    StorageCorruptError,
    StreamBusyError,
    StreamCompletedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep._lifecycle import (
    FORGET_OPEN_SECONDS,
    Life,
    Terms,
    abandon,
    begin,
    cancel,
    extend,
    finish,
    grow,
    is_expired,
    life_of,
    release,
    take_over,
    why_refused,
)

TERMS = Terms(ttl=300.0, lease=10.0, grace=5.0)
NOW = 1_800_000_000.0
Change = Callable[[Life, float], Life]


def opened() -> Life:
    return begin(NOW, "w1", TERMS, {"owner": "ann"})


def test_a_stream_begins_empty_and_leased_to_its_writer() -> None:
    life = opened()

    assert (life.head.tail, life.state.status, life.state.writer, life.state.lease_until) == (0, "open", "w1", NOW + 10)
    assert (life.state.created_at, life.state.metadata) == (NOW, {"owner": "ann"})
    assert life_of(life.head) == life


def test_a_foreign_state_is_corruption() -> None:
    with pytest.raises(StorageCorruptError):
        life_of(replace(opened().head, state=b"{}"))


def test_a_write_leaves_the_state_as_it_is() -> None:
    life = opened()
    grown = grow(life, 3, NOW + 1)

    assert grown.head.state is life.head.state
    assert (grown.head.tail, grown.head.expires_at) == (3, life.head.expires_at)


def test_extending_renews_the_lease_and_the_expiry() -> None:
    life = extend(opened(), NOW + 8, TERMS)

    assert life.state.lease_until == NOW + 18
    assert life.head.expires_at == NOW + 18 + 5 + FORGET_OPEN_SECONDS


def test_a_stream_is_taken_over_when_its_lease_has_lapsed_and_no_moment_before() -> None:
    with pytest.raises(StreamBusyError) as busy:
        take_over(opened(), NOW + 9.999, "w2", TERMS)
    taken = take_over(opened(), NOW + 10, "w2", TERMS)

    assert busy.value.lease_until == NOW + 10
    assert (taken.state.writer, taken.state.lease_until, taken.state.created_at) == ("w2", NOW + 20, NOW)


def test_a_stream_that_was_let_go_can_be_taken_over_at_once() -> None:
    released = release(opened(), NOW + 1, TERMS)

    assert (released.state.writer, released.state.status) == ("", "open")
    assert take_over(released, NOW + 1, "w2", TERMS).state.writer == "w2"


def test_a_stream_that_has_ended_cannot_be_taken_over() -> None:
    with pytest.raises(StreamCompletedError, match="CANCELLED"):
        take_over(finish(opened(), NOW, TERMS, "CANCELLED"), NOW + 99, "w2", TERMS)
    with pytest.raises(StreamCompletedError, match="done"):
        take_over(finish(opened(), NOW, TERMS), NOW + 99, "w2", TERMS)


@pytest.mark.promise("P12")
def test_ttl_counts_from_completion() -> None:
    life = finish(opened(), NOW + 1000, TERMS)

    assert (life.state.status, life.state.writer, life.state.error, life.head.tail) == ("done", "", None, 1)
    assert not is_expired(life.head, NOW + 1299.999)
    assert is_expired(life.head, NOW + 1300)


def test_a_failed_stream_carries_its_status() -> None:
    life = finish(opened(), NOW, TERMS, "NOT_FOUND")

    assert (life.state.status, life.state.error) == ("error", "NOT_FOUND")


@pytest.mark.promise("P6")
def test_a_stream_is_abandoned_after_lease_and_grace_and_no_moment_before() -> None:
    assert abandon(opened(), NOW + 14.999, TERMS) is None
    ended = abandon(opened(), NOW + 15, TERMS)

    assert ended is not None
    assert (ended.state.status, ended.state.error, ended.head.tail) == ("error", "ABORTED", 1)


def test_a_stream_that_was_let_go_is_abandoned_as_if_its_writer_had_died_then() -> None:
    released = release(opened(), NOW + 7, TERMS)

    assert abandon(released, NOW + 21.999, TERMS) is None
    assert abandon(released, NOW + 22, TERMS) is not None


def test_a_stream_that_has_ended_is_neither_abandoned_nor_cancelled() -> None:
    done = finish(opened(), NOW, TERMS)

    assert abandon(done, NOW + 99, TERMS) is None
    assert cancel(done, NOW, TERMS) is None


def test_cancelling_ends_the_stream() -> None:
    ended = cancel(opened(), NOW, TERMS)

    assert ended is not None
    assert (ended.state.error, ended.head.tail, ended.head.expires_at) == ("CANCELLED", 1, NOW + 300)


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (None, StreamNotFoundError),
        (finish(opened(), NOW, TERMS), StreamCompletedError),
        (take_over(opened(), NOW + 10, "w2", TERMS), StreamTakenOverError),
        (release(opened(), NOW, TERMS), StreamTakenOverError),
        (opened(), StorageCorruptError),
    ],
)
def test_why_a_commit_was_refused(there: Life | None, why: type[StreamkeepError]) -> None:
    assert type(why_refused(there, "w1")) is why


CHANGES: list[Change] = [
    lambda life, now: grow(life, 1, now),
    lambda life, now: extend(life, now, TERMS),
    lambda life, now: take_over(release(life, now, TERMS), now, "w2", TERMS),
    lambda life, now: finish(life, now, TERMS),
]


@given(after=st.integers(0, 2**62), history=st.lists(st.tuples(st.sampled_from(CHANGES), st.floats(0, 4e9))))
def test_versions_only_grow_whatever_the_clock_does(after: int, history: list[tuple[Change, float]]) -> None:
    life = begin(NOW, "w1", TERMS, {}, after_version=after)
    assert life.head.version > after

    for change, now in history:
        if life.state.status == "open":
            earlier, life = life, change(life, now)
            assert life.head.version > earlier.head.version
