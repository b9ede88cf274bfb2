"""BatchTask: everything that is asked is answered, in order, many at a time."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from tests.storages.failures import assert_each_has_its_own

from streamkeep.errors import StorageError
from streamkeep.storages._batch_task import BatchTask


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


BROKEN = 1_000_000
RAISES = {-100: RuntimeError("a bug"), -200: SystemExit(3)}


class Engine:
    """Doubles numbers, and notes the batches; a negative one is refused, BROKEN and those that raise end their batch."""

    def __init__(self, raises: Mapping[int, BaseException] = RAISES) -> None:
        self.raises = raises
        self.batches: list[list[int]] = []
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def run(self, numbers: Sequence[int]) -> Sequence[int | StorageError]:
        self.batches.append(list(numbers))
        self.begun.set()
        await self.go.wait()
        if BROKEN in numbers:
            raise StorageError("broken")
        for number in numbers:
            if number in self.raises:
                raise self.raises[number]
        return [StorageError("refused") if number < 0 else 2 * number for number in numbers]


async def test_what_is_asked_while_a_batch_is_under_way_is_the_next_one() -> None:
    engine = Engine()
    engine.go.clear()
    async with BatchTask(engine.run) as batches:
        first = batches.ask(0)
        await asyncio.sleep(0)
        rest = [batches.ask(number) for number in range(1, 65)]
        engine.go.set()
        assert await asyncio.gather(first, *rest) == [2 * number for number in range(65)]
    assert engine.batches == [[0], list(range(1, 65))]


async def test_a_batch_has_a_bound() -> None:
    engine = Engine()
    async with BatchTask(engine.run, max_batch=10) as batches:
        await asyncio.gather(*(batches.ask(number) for number in range(25)))
    assert [len(batch) for batch in engine.batches] == [10, 10, 5]


async def test_an_error_is_that_of_one_request_or_of_all() -> None:
    async with BatchTask(Engine().run) as batches:
        one, other = batches.ask(-1), batches.ask(1)
        with pytest.raises(StorageError, match="refused"):
            await one
        assert await other == 2
        both = batches.ask(BROKEN), batches.ask(1)
        for future in both:
            with pytest.raises(StorageError, match="broken"):
                await future
        assert await batches.ask(2) == 4


async def test_a_failure_that_hundreds_wait_for_is_one_exception_for_each() -> None:
    async with BatchTask(Engine().run, max_batch=10_000) as batches:
        for number in (BROKEN, *RAISES):
            failures = await asyncio.gather(*[batches.ask(number) for _ in range(400)], return_exceptions=True)
            assert_each_has_its_own(failures)


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(5, "x"), RecursionError(), SystemExit(3), GeneratorExit()])
async def test_whatever_is_raised_ends_one_batch(error: BaseException) -> None:
    async with BatchTask(Engine({7: error}).run) as batches:
        with pytest.raises(StorageError, match=type(error).__name__) as caught:
            await batches.ask(7)
        assert caught.value.__cause__ is error  # so that its traceback is not lost
        assert await batches.ask(2) == 4


async def test_a_cancellation_that_is_not_of_the_task_ends_one_batch() -> None:
    async with BatchTask(Engine({7: asyncio.CancelledError()}).run) as batches:
        with pytest.raises(StorageError, match="CancelledError"):
            await batches.ask(7)
        assert await batches.ask(2) == 4


@pytest.mark.parametrize("count", [0, 3])
async def test_answers_that_are_too_few_or_too_many_are_nobodys(count: int) -> None:
    async def run(numbers: Sequence[int]) -> Sequence[int]:
        return [0] * count if numbers == [1, 2] else numbers

    async with BatchTask(run) as batches:
        failures = await asyncio.gather(batches.ask(1), batches.ask(2), return_exceptions=True)
        assert_each_has_its_own(failures)
        assert await batches.ask(3) == 3


def test_an_interrupt_from_the_keyboard_reaches_whoever_runs_the_loop_and_the_task_goes_on() -> None:
    async def use() -> None:
        async with BatchTask(Engine({7: KeyboardInterrupt()}).run) as batches:
            with pytest.raises(StorageError, match="KeyboardInterrupt"):
                await batches.ask(7)
            interrupted.append(await batches.ask(2))

    interrupted: list[int] = []
    loop = asyncio.new_event_loop()
    using = loop.create_task(use())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(using)
    loop.run_until_complete(using)
    loop.close()
    assert interrupted == [4]


async def test_a_request_after_the_end_is_told_so() -> None:
    async with BatchTask(Engine().run) as batches:
        assert await batches.ask(1) == 2
    async with asyncio.timeout(1):
        with pytest.raises(StorageError, match="was closed"):
            await batches.ask(1)


async def test_a_caller_that_is_cancelled_takes_nobody_along() -> None:
    async with BatchTask(Engine().run) as batches:
        cancelled, other = batches.ask(1), batches.ask(2)
        cancelled.cancel()
        assert await other == 4


async def test_leaving_finishes_what_was_asked() -> None:
    async with BatchTask(Engine().run, max_batch=1) as batches:
        asked = [batches.ask(number) for number in range(3)]
    assert [future.result() for future in asked] == [0, 2, 4]


async def test_leaving_that_is_cancelled_leaves_no_task_and_nobody_waiting() -> None:
    engine = Engine()
    engine.go.clear()
    before = asyncio.all_tasks()
    asked: list[asyncio.Future[int]] = []

    async def leave() -> None:
        async with BatchTask(engine.run, max_batch=1) as batches:
            asked.extend(batches.ask(number) for number in range(2))
            await engine.begun.wait()

    leaving = asyncio.create_task(leave())
    await engine.begun.wait()
    await asyncio.sleep(0)  # it is being left now
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    for future in asked:
        async with asyncio.timeout(1):
            with pytest.raises(StorageError, match="was closed before it had answered"):
                await future
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
