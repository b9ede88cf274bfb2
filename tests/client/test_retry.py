"""When a client comes back: rules, with a clock and a lot that are given."""

from datetime import timedelta

import pytest

from streamkeep import InvalidArgumentError
from streamkeep.client import Retry
from streamkeep.client._retry import Budget


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def pauses(retry: Retry, part: float, number: int) -> list[float | None]:
    budget = Budget(retry, Clock(), lambda: part)
    return [budget.next_pause() for _ in range(number)]


def test_pauses_double_up_to_the_longest_and_are_a_random_part() -> None:
    retry = Retry(first=timedelta(seconds=1), longest=timedelta(seconds=5))
    assert pauses(retry, 1.0, 5) == [1, 2, 4, 5, 5]
    assert pauses(retry, 0.5, 5) == [0.5, 1, 2, 2.5, 2.5]
    assert pauses(retry, 0.0, 2) == [0, 0]


def test_it_gives_up_after_so_many_tries_that_bring_nothing() -> None:
    assert pauses(Retry(tries=2), 0.0, 3) == [0, 0, None]
    assert pauses(Retry(tries=0), 0.0, 1) == [None]
    assert None not in pauses(Retry(tries=None), 0.0, 5000)


def test_it_gives_up_when_nothing_new_has_come_for_so_long() -> None:
    clock = Clock()
    budget = Budget(Retry(within=timedelta(seconds=10), first=timedelta(seconds=4)), clock, lambda: 1.0)
    clock.seconds = 6
    assert budget.next_pause() == 4
    clock.seconds = 10
    assert budget.next_pause() is None


def test_progress_renews_it() -> None:
    clock = Clock()
    budget = Budget(Retry(tries=1, within=timedelta(seconds=10), first=timedelta(0)), clock)
    for _ in range(5):
        clock.seconds += 9
        assert budget.next_pause() == 0
        budget.progress()
    assert budget.next_pause() == 0
    assert budget.next_pause() is None


def test_a_connection_that_has_brought_heartbeats_for_a_while_is_progress() -> None:
    clock = Clock()
    budget = Budget(Retry(tries=1, within=timedelta(seconds=10), first=timedelta(0)), clock)
    for _ in range(5):
        budget.connected()
        clock.seconds += 60
        budget.heard()
        clock.seconds += 9
        assert budget.next_pause() == 0
    budget.connected()
    clock.seconds += 0.1
    budget.heard()  # and is cut at once
    assert budget.next_pause() is None


def test_what_the_server_says_takes_the_place_of_the_first_pause_and_no_pause_is_longer_than_the_longest() -> None:
    budget = Budget(Retry(longest=timedelta(seconds=10)), Clock(), lambda: 1.0)
    assert [budget.next_pause(3.0) for _ in range(3)] == [3, 6, 10]
    assert Budget(Retry(longest=timedelta(seconds=10)), Clock(), lambda: 1.0).next_pause(1e12) == 10


def test_what_the_server_asks_for_is_waited_in_any_case_unless_it_is_too_long() -> None:
    retry = Retry(first=timedelta(seconds=1), longest_asked=timedelta(seconds=60))
    assert Budget(retry, Clock(), lambda: 0.5).next_pause(None, 30.0) == 30.5
    assert Budget(retry, Clock(), lambda: 0.5).next_pause(None, 61.0) is None


@pytest.mark.parametrize("options", [{"tries": -1}, {"first": timedelta(-1)}, {"within": timedelta(-1)}])
def test_a_budget_is_not_negative(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        Retry(**options)  # type: ignore[arg-type]  # of the parameters
