from collections.abc import Callable
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from streamkeep import (
    OffsetOutOfRangeError,
    StorageCorruptError,
    StreamBusyError,
    StreamCompletedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep._lifecycle import (
    EXTEND_SECONDS,
    FORGET_OPEN_SECONDS,
    LOOK_AT_ALL,
    MAX_EPOCHS,
    MAX_MAIL,
    MEASURE_BYTES,
    MEASURE_RECORDS,
    Beginning,
    Life,
    Mail,
    Terms,
    abandon,
    begin,
    cancel,
    challenge,
    check_history,
    committed_at,
    extend,
    finish,
    grow,
    is_expired,
    life_of,
    mail_of,
    post,
    release,
    renew,
    seems_alive,
    session_of,
    take_over,
    why_refused,
)
from streamkeep.storage import Head

TERMS = Terms(ttl=300.0, lease=10.0, grace=5.0)
NOW = 1_800_000_000.0
Change = Callable[[Life, float], Life]


def opened(writer: str = "w1") -> Life:
    return begin(NOW, "s1", writer, Beginning(300.0, {"owner": "ann"}))


def taken_over(life: Life, writer: str = "w2") -> Life:
    return take_over(life, NOW + 10, "s2", writer, inf, TERMS)


def test_a_stream_begins_empty_and_is_its_writers() -> None:
    life = opened()

    assert (life.head.tail, life.state.status, life.state.writer, life.state.session) == (0, "open", "w1", "s1")
    assert (life.state.created_at, life.state.metadata, life.state.life) == (NOW, {"owner": "ann"}, "w1")
    assert life.head.expires_at == NOW + FORGET_OPEN_SECONDS
    assert life_of(life.head) == life


@pytest.mark.parametrize(
    "state", [b"", b"?", b"{}", b"\xff", b"[" * 100_000, b'{"created_at":1,"ttl":1,"epochs":[]}'], ids=lambda state: state[:9]
)
def test_a_state_that_cannot_be_read_is_corruption(state: bytes) -> None:
    with pytest.raises(StorageCorruptError):
        life_of(replace(opened().head, state=state))


def test_a_state_that_is_known_is_not_read_again() -> None:
    life = opened()
    head = grow(life, 1, 10, NOW).head

    assert life_of(head, life).state is life.state
    assert life_of(taken_over(life).head, life).state.writer == "w2"


def test_a_write_leaves_the_state_as_it_is() -> None:
    life = opened()
    grown = grow(life, 3, 30, NOW + 1)

    assert grown.head.state is life.head.state
    assert (grown.head.tail, grown.head.expires_at) == (3, life.head.expires_at)


@pytest.mark.parametrize(("count", "size"), [(MEASURE_RECORDS, 10), (1, MEASURE_BYTES)])
def test_a_streams_size_is_noted_now_and_then(count: int, size: int) -> None:
    life = grow(opened(), count, size, NOW)

    assert (life.state.measured, life.state.size) == (count, size)
    assert life_of(life.head) == life
    assert grow(life, 1, size + 1, NOW).head.state is life.head.state


def test_extending_puts_off_the_expiry_and_changes_nothing_else() -> None:
    life = extend(opened(), NOW + 8)

    assert life.head.expires_at == NOW + 8 + FORGET_OPEN_SECONDS
    assert life.state == opened().state
    assert EXTEND_SECONDS < FORGET_OPEN_SECONDS


def test_writing_puts_off_the_expiry_when_that_is_near_and_leaves_it_else() -> None:
    life = opened()
    early, late = grow(life, 1, 10, NOW + EXTEND_SECONDS), grow(life, 1, 10, NOW + EXTEND_SECONDS + 1)

    assert early.head.expires_at == life.head.expires_at
    assert late.head.expires_at == NOW + EXTEND_SECONDS + 1 + FORGET_OPEN_SECONDS
    assert late.head.state == life.head.state


@pytest.mark.promise("P5", "P6")
def test_a_stream_is_taken_over_when_its_session_has_been_silent_for_its_lease_and_no_moment_before() -> None:
    with pytest.raises(StreamBusyError) as busy:
        take_over(opened(), NOW + 1_000_000, "s2", "w2", 9.75, TERMS)
    taken = take_over(opened(), NOW, "s2", "w2", 10, TERMS)

    assert busy.value.retry_after == 0.25
    assert (taken.state.session, taken.state.writer, taken.state.life, taken.state.created_at) == ("s2", "w2", "w1", NOW)


def test_a_stream_that_was_released_can_be_taken_over_at_once() -> None:
    released = release(opened(), NOW + 1)

    assert (released.state.session, released.state.status) == ("", "open")
    assert take_over(released, NOW + 1, "s2", "w2", 0, TERMS).state.writer == "w2"


def test_a_stream_that_has_ended_cannot_be_taken_over() -> None:
    with pytest.raises(StreamCompletedError, match="CANCELLED"):
        take_over(finish(opened(), NOW, "CANCELLED"), NOW + 99, "s2", "w2", inf, TERMS)
    with pytest.raises(StreamCompletedError, match="done"):
        take_over(finish(opened(), NOW), NOW + 99, "s2", "w2", inf, TERMS)


@pytest.mark.promise("P12")
def test_ttl_counts_from_completion() -> None:
    life = finish(opened(), NOW + 1000)

    assert (life.state.status, life.state.session, life.state.error, life.head.tail) == ("done", "", None, 1)
    assert not is_expired(life, NOW + 1299.75)
    assert is_expired(life, NOW + 1300)


@pytest.mark.promise("P12")
def test_an_open_stream_does_not_expire() -> None:
    assert not is_expired(opened(), inf)


def test_a_failed_stream_carries_its_status() -> None:
    life = finish(opened(), NOW, "NOT_FOUND")

    assert (life.state.status, life.state.error) == ("error", "NOT_FOUND")


@pytest.mark.promise("P6")
def test_a_stream_is_abandoned_after_lease_and_grace_of_silence_and_no_moment_before_whatever_the_clock_says() -> None:
    assert abandon(opened(), NOW + 1_000_000, 14.75, TERMS, "w3") is None
    ended = abandon(opened(), NOW - 1_000_000, 15, TERMS, "w3")

    assert ended is not None
    assert (ended.state.status, ended.state.error, ended.head.tail) == ("error", "ABORTED", 1)


def test_a_released_stream_is_free_also_when_the_clock_went_back() -> None:
    released = release(opened(), NOW + 3_600)

    assert take_over(released, NOW, "s2", "w2", 0.0, TERMS).state.writer == "w2"


def test_a_stream_that_was_released_is_abandoned_as_if_its_writer_had_died_then() -> None:
    released = release(opened(), NOW + 7)

    assert abandon(released, NOW + 21.75, inf, TERMS, "w3") is None
    assert abandon(released, NOW + 22, 0, TERMS, "w3") is not None


def test_a_stream_that_has_ended_is_neither_abandoned_nor_cancelled() -> None:
    done = finish(opened(), NOW)

    assert abandon(done, NOW + 99, inf, TERMS, "w3") is None
    assert cancel(done, NOW, "w3") is None


def test_cancelling_ends_the_stream() -> None:
    ended = cancel(opened(), NOW, "w3")

    assert ended is not None
    assert (ended.state.error, ended.head.tail, ended.head.expires_at) == ("CANCELLED", 1, NOW + 300)


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (None, StreamNotFoundError),
        (finish(opened(), NOW), StreamCompletedError),
        (taken_over(opened()), StreamTakenOverError),
        (taken_over(release(opened(), NOW)), StreamTakenOverError),
        (opened(), StorageCorruptError),
        (begin(NOW, "session", "another", Beginning(300.0)), StreamNotFoundError),
    ],
)
def test_why_a_commit_was_refused(there: Life | None, why: type[StreamkeepError]) -> None:
    assert type(why_refused(None if there is None else there.head, opened().state)) is why


def test_a_head_that_cannot_be_read_is_somebody_elses() -> None:
    assert type(why_refused(Head(1, 0, b"?", inf), opened().state)) is StorageCorruptError


CHANGES: list[Change] = [
    lambda life, now: grow(life, 1, life.head.tail + 1, now),
    extend,
    lambda life, now: take_over(release(life, now), now, "s2", "w2", 0, TERMS),
    finish,
]


@given(after=st.integers(0, 2**62), history=st.lists(st.tuples(st.sampled_from(CHANGES), st.floats(0, 4e9))))
def test_versions_only_grow_whatever_the_clock_does(after: int, history: list[tuple[Change, float]]) -> None:
    life = begin(NOW, "s1", "w1", Beginning(300.0), after_version=after)
    assert life.head.version > after

    for change, now in history:
        if life.state.status == "open":
            earlier, life = life, change(life, now)
            assert life.head.version > earlier.head.version


@pytest.mark.promise("P19")
def test_versions_of_different_writers_differ_at_the_same_instant() -> None:
    common = release(opened(), NOW)
    versions = {take_over(common, NOW + 1, "s2", f"w{number}", 0, TERMS).head.version for number in range(50)}

    assert len(versions) >= 49  # of 4,096 numbers


@given(st.floats(1e9, 4e9))
def test_a_version_tells_when_it_was_committed(now: float) -> None:
    assert committed_at(begin(now, "s1", "w1", Beginning(300.0)).head) == pytest.approx(now, abs=0.001)


# A storage that went back


def written(life: Life, count: int) -> Life:
    return grow(life, count, life.head.tail + count, NOW)


@pytest.mark.promise("P19")
def test_a_reader_of_what_a_storage_lost_cannot_go_on() -> None:
    seen = written(opened(), 10)
    back = written(opened(), 5)

    check_history(seen, 5, back)
    with pytest.raises(OffsetOutOfRangeError, match="6 events"):
        check_history(seen, 6, back)


@pytest.mark.promise("P19")
def test_a_reader_of_what_a_storage_lost_cannot_go_on_when_another_writer_has_made_the_log_longer_again() -> None:
    seen = written(opened(), 10)
    back = written(taken_over(written(opened(), 5)), 20)

    check_history(seen, 5, back)
    with pytest.raises(OffsetOutOfRangeError):
        check_history(seen, 6, back)


@pytest.mark.promise("P19")
def test_a_reader_of_what_a_storage_lost_cannot_go_on_when_it_was_cancelled_meanwhile() -> None:
    seen = written(opened(), 6)
    back = cancel(written(opened(), 5), NOW, "w3")

    assert back is not None
    assert back.head.tail == seen.head.tail
    check_history(seen, 5, back)
    with pytest.raises(OffsetOutOfRangeError):
        check_history(seen, 6, back)


@pytest.mark.promise("P21")
def test_a_reader_cannot_go_on_with_another_stream() -> None:
    with pytest.raises(StreamNotFoundError):
        check_history(opened("w1"), 0, opened("w2"))


Step = tuple[int, str]
STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["take over", "release", "extend"])), max_size=10)


def replayed(life: Life, log: list[str], steps: list[Step], name: str) -> Life:
    """Let writers, each with a name of its own, write so many records and do something."""
    for number, (count, step) in enumerate(steps):
        log += [f"{life.state.writer}:{offset}" for offset in range(life.head.tail, life.head.tail + count)]
        life = written(life, count)
        taken = take_over(release(life, NOW), NOW, "s2", f"{name}{number}", 0, TERMS)
        life = extend(life, NOW) if step == "extend" else taken
    return life


@pytest.mark.promise("P19")
@given(common=STEPS, lost=STEPS, instead=STEPS, reached=st.integers(0, 200))
def test_a_reader_goes_on_exactly_if_what_it_has_read_is_still_there(
    common: list[Step], lost: list[Step], instead: list[Step], reached: int
) -> None:
    log: list[str] = []
    kept = replayed(opened(), log, common, "k")
    seen_log, new_log = list(log), list(log)
    # What is lost was written by the last writer before it, who is refused afterwards: the first one to write then has taken over.
    seen = replayed(kept, seen_log, lost, "l")
    new = replayed(taken_over(release(kept, NOW), "n"), new_log, instead, "n")
    reached = min(reached, seen.head.tail)

    if seen_log[:reached] == new_log[:reached]:
        check_history(seen, reached, new)
    else:
        with pytest.raises(OffsetOutOfRangeError):
            check_history(seen, reached, new)


@given(common=STEPS, later=STEPS, reached=st.integers(0, 200))
def test_a_reader_goes_on_with_whatever_writers_make_of_a_stream(common: list[Step], later: list[Step], reached: int) -> None:
    seen = replayed(opened(), [], common, "a")

    check_history(seen, min(reached, seen.head.tail), replayed(seen, [], later, "b"))


def test_a_stream_with_many_writers_has_a_head_that_stays_small() -> None:
    life = opened()
    for number in range(1_000):
        life = written(taken_over(release(life, NOW), f"w{number}"), 1)

    assert len(life.state.epochs) == MAX_EPOCHS
    assert (life.state.life, life.state.writer) == ("w1", "w999")
    check_history(life, 1_000, written(life, 1))


# Sessions


def test_a_session_counts_its_renewals_and_others_do_not() -> None:
    first = renew(None, 1, NOW, "s1", TERMS)
    asked = challenge(first, session_of(first), NOW, "s2")
    state = session_of(asked)

    assert (state.beat, state.lease, state.grace, state.is_challenged) == (1, 10, 5, True)
    renewed = session_of(renew(asked, 2, NOW, "s1", TERMS))
    assert (renewed.beat, renewed.is_challenged, renewed.is_over) == (2, False, False)
    assert session_of(renew(asked, 3, NOW, "s1", TERMS, is_over=True)).is_over


def test_of_more_mail_than_fits_it_is_said_that_there_is_much() -> None:
    streams = tuple(f"s{number}" for number in range(MAX_MAIL))
    head = post(post(None, Mail(streams[:1]), NOW, "s2"), Mail(streams[1:]), NOW, "s2")
    assert mail_of(head) == Mail(streams)

    assert mail_of(post(head, Mail(("one more",)), NOW, "s2")) == Mail((LOOK_AT_ALL,))


def test_what_is_too_much_to_be_cancelled_is_left_out() -> None:
    cancel = {f"s{number}": "life" for number in range(MAX_MAIL)}
    head = post(post(None, Mail(("a",)), NOW, "s2"), Mail((), cancel), NOW, "s2")
    assert mail_of(head) == Mail(("a",), cancel)

    assert mail_of(post(head, Mail(("b",), {"one more": "life"}), NOW, "s2")) == Mail(("a", "b"), cancel)


def test_mail_that_cannot_be_read_may_say_anything() -> None:
    assert mail_of(Head(1, 0, b"?", inf)) == Mail((LOOK_AT_ALL,))


def test_a_session_that_cannot_be_read_is_corruption() -> None:
    with pytest.raises(StorageCorruptError):
        session_of(Head(1, 0, b"?", inf))


def test_a_session_seems_alive_for_its_lease_and_grace() -> None:
    head = renew(None, 1, NOW, "s1", TERMS)

    assert seems_alive(head, NOW + 14.9)
    assert not seems_alive(head, NOW + 15.1)
    assert not seems_alive(renew(head, 2, NOW, "s1", TERMS, is_over=True), NOW)
