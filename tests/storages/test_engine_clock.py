"""EngineClock: the engine's time, whatever becomes of the local one, and as exact as the quickest answer."""

import pytest

from streamkeep.errors import StorageError
from streamkeep.storages._engine_clock import REFRESH_SECONDS, EngineClock


class Monotonic:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def monotonic() -> Monotonic:
    return Monotonic()


@pytest.fixture
def clock(monotonic: Monotonic) -> EngineClock:
    return EngineClock(monotonic)


def measure(clock: EngineClock, monotonic: Monotonic, engine: float, *, took: float) -> None:
    asked_at = clock.start()
    monotonic.now += took
    clock.set(engine, asked_at)


def test_a_clock_that_was_never_measured_says_so(clock: EngineClock) -> None:
    assert clock.is_stale
    with pytest.raises(StorageError, match="never measured"):
        clock.time()


def test_it_goes_on_from_what_the_engine_said(clock: EngineClock, monotonic: Monotonic) -> None:
    clock.set(5000.0)
    assert clock.time() == 5000
    monotonic.now += 7
    assert clock.time() == 5007


def test_the_engine_is_taken_to_have_answered_in_the_middle(clock: EngineClock, monotonic: Monotonic) -> None:
    measure(clock, monotonic, 5000.0, took=4)
    assert clock.time() == 5002


def test_a_slow_answer_does_not_spoil_what_a_quick_one_has_said(clock: EngineClock, monotonic: Monotonic) -> None:
    measure(clock, monotonic, 5000.0, took=0)
    for _ in range(10):
        before = clock.time()
        measure(
            clock, monotonic, before + 19.9, took=20
        )  # it was asked at once, and the answer was late; or this process was busy
        assert clock.time() == pytest.approx(before + 20, abs=0.1)
        assert clock.time() == pytest.approx(monotonic.now + 4000, abs=0.1)


def test_a_quick_answer_replaces_a_slow_one(clock: EngineClock, monotonic: Monotonic) -> None:
    measure(clock, monotonic, 5000.0, took=20)
    measure(clock, monotonic, 5001.0, took=0)
    assert clock.time() == 5001


@pytest.mark.parametrize("took", [0, 3])
@pytest.mark.parametrize("jump", [-3600, -10, 10, 3600])
def test_a_clock_that_was_set_or_another_servers_is_believed(
    clock: EngineClock, monotonic: Monotonic, jump: float, took: float
) -> None:
    measure(clock, monotonic, 5000.0, took=0)
    measure(clock, monotonic, 5000.0 + jump, took=took)
    assert clock.time() == pytest.approx(5000 + jump + took / 2)


def test_drift_is_made_good(clock: EngineClock, monotonic: Monotonic) -> None:
    measure(clock, monotonic, 5000.0, took=0.001)
    for minute in range(1, 1000):
        monotonic.now += 60
        measure(clock, monotonic, 5000.0 + minute * 60.003, took=0.001)
        assert clock.time() == pytest.approx(5000 + minute * 60.003, abs=0.02)


def test_it_is_stale_some_time_after_it_was_measured(clock: EngineClock, monotonic: Monotonic) -> None:
    clock.set(5000.0)
    assert not clock.is_stale
    monotonic.now += REFRESH_SECONDS + 1
    assert clock.is_stale
    measure(clock, monotonic, 5010.0, took=8)  # an answer that is of no use is none to ask again at once for
    assert not clock.is_stale
