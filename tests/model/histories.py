"""Random histories: so many, each of so many steps, the same ones for the same seed."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from .kinds import Kind

STEPS: Final = 50

Machine = Callable[[Kind, Counter[str]], RuleBasedStateMachine]


def run_histories(machine: Machine, kind: Kind, *, examples: int, seed_number: int) -> Counter[str]:
    """Run the machine over this kind of storage, and give what it has counted; what fails is told as a story, as short as can be."""
    counted: Counter[str] = Counter()
    rules = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    try:
        factory = seed(seed_number)(lambda: machine(kind, counted))
        run_state_machine_as_test(factory, settings=rules)  # type: ignore[arg-type]  # it takes "a class or a function"
    except BaseException as error:
        error.add_note(f"{machine.__name__} over {kind.name}, seed {seed_number}, {examples} examples")
        raise
    return counted
