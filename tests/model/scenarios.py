"""What a program does with streams, each scenario so small that it can be struck at every point.

A scenario prepares a World and gives the action that is to be struck. What the action is told it notes in the World.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from streamkeep import StreamManager
from streamkeep.errors import StreamManagerClosedError, StreamTakenOverError
from streamkeep.storage import Head

from .world import KEY, LEASE, OWNER, RIVALS, STREAM, Scribe, World

Act = Callable[[], Awaitable[object]]
Scenario = Callable[[World], Awaitable[Act]]

SEVERAL_PAGES: Final = 1_100


class OopsError(Exception):
    """What a producer raises."""


async def opening(world: World) -> Act:
    return lambda: world.scribe().open(world.streams)


async def opening_under_a_key(world: World) -> Act:
    world.is_under_a_key = True
    return lambda: world.scribe().open_under_a_key(world.streams)


async def replacing(world: World) -> Act:
    world.is_under_a_key = True
    async with world.elsewhere.open("replaced", owner=OWNER, key=KEY):
        pass
    return lambda: world.scribe().open_under_a_key(world.streams, replace=True)


async def opening_what_has_expired(world: World) -> Act:
    async with world.one_more_manager(ttl=timedelta(seconds=1)) as forgetful, forgetful.open(STREAM) as stream:
        await stream.done("forgotten")
    await anyio.sleep(2)
    return lambda: world.scribe().open(world.streams)


async def resuming(world: World) -> Act:
    scribe = await _writer(world)
    await scribe.close()
    return lambda: world.scribe().open(world.streams, resume=True)


async def resuming_what_is_not_there(world: World) -> Act:
    return lambda: world.scribe().open(world.streams, resume=True)


async def taking_over_from_a_dead_writer(world: World) -> Act:
    await world.dead_writer()
    return lambda: world.resume(world.scribe(), world.streams)


async def writing(world: World) -> Act:
    return (await _writer(world)).write


async def writing_after_a_take_over(world: World) -> Act:
    scribe = await _writer(world)
    world.told.news = RIVALS
    world.storage.is_down = True  # until it is taken for dead
    await world.resume(world.scribe())
    world.storage.is_down = False

    async def act() -> None:
        with suppress(StreamTakenOverError):
            await scribe.write()
            raise AssertionError("who was taken over from has written")

    return act


async def several_writing_at_once(world: World) -> Act:
    scribe = await _writer(world)

    async def act() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(scribe.write)

    return act


async def writing_soon(world: World) -> Act:
    scribe = await _writer(world)

    async def act() -> None:
        for _ in range(3):
            scribe.write_soon()
            await checkpoint()

    return act


async def flushing(world: World) -> Act:
    scribe = await _writer(world)

    async def act() -> None:
        for _ in range(3):
            scribe.write_soon()
        await scribe.flush()

    return act


async def finishing(world: World) -> Act:
    scribe = await _writer(world)
    scribe.write_soon()
    return scribe.done


async def failing(world: World) -> Act:
    scribe = await _writer(world)
    scribe.write_soon()
    return scribe.error


async def closing(world: World) -> Act:
    scribe = await _writer(world)
    scribe.write_soon()
    return scribe.close


async def leaving_the_block(world: World) -> Act:
    return lambda: _in_a_block(world, lambda scribe: scribe.write())


async def leaving_the_block_when_done(world: World) -> Act:
    async def work(scribe: Scribe) -> None:
        scribe.write_soon()
        await scribe.done()

    return lambda: _in_a_block(world, work)


async def leaving_the_block_by_an_exception(world: World) -> Act:
    raised: list[OopsError] = []

    async def work(scribe: Scribe) -> None:
        await scribe.write()
        raised.append(OopsError())
        raise raised[0]

    async def act() -> None:
        try:
            await _in_a_block(world, work)
        except BaseException as arrived:
            if raised and world.is_storage_well:
                if arrived is not raised[0]:
                    raise AssertionError("an exception leaves the block as it is") from arrived
                world.told.outcome = "error"
            elif not isinstance(arrived, OopsError):
                raise
        finally:
            raised.clear()

    return act


async def leaving_the_block_by_cancellation(world: World) -> Act:
    async def work(scribe: Scribe) -> None:
        await scribe.write()
        scribe.write_soon()
        scope.cancel()
        await checkpoint()

    scope = anyio.CancelScope()

    async def act() -> None:
        with scope:
            await _in_a_block(world, work)

    return act


async def outliving_the_lease(world: World) -> Act:
    scribe = await _writer(world)

    async def act() -> None:
        with anyio.move_on_after(LEASE + 1):
            await scribe.stream.cancelled.wait()
        await scribe.write()

    return act


async def cancelling(world: World) -> Act:
    await _writer(world)
    world.told.news = RIVALS

    async def act() -> None:
        if await world.streams.cancel(STREAM):
            world.told.outcome = "cancelled"

    return act


async def hearing_of_a_cancellation_elsewhere(world: World) -> Act:
    scribe = await _writer(world)
    world.told.news = RIVALS

    async def act() -> None:
        await world.cancel_elsewhere()
        await scribe.stream.cancelled.wait()

    return act


async def deleting(world: World) -> Act:
    await _writer(world)
    world.told.news = RIVALS
    world.told.may_be_deleted = True

    async def act() -> None:
        await world.streams.delete(STREAM)
        world.told.outcome = "deleted"

    return act


async def asking(world: World) -> Act:
    await _writer(world)

    async def act() -> None:
        assert (await world.streams.info(STREAM)).tail >= 1
        assert len(await world.streams.list()) <= 1

    return act


async def replaying(world: World) -> Act:
    scribe = await _writer(world)
    for _ in range(SEVERAL_PAGES):
        scribe.write_soon()
    await scribe.done()
    scribe.input = None
    return world.replay


async def following(world: World) -> Act:
    scribe = await _writer(world, world.elsewhere)

    async def write() -> None:
        await scribe.write()
        await anyio.sleep(1)
        await scribe.write()
        await scribe.done()

    async def act() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await world.replay()

    return act


async def writing_to_followers(world: World) -> Act:
    scribe = await _writer(world)

    async def act() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.replay)
            tasks.start_soon(world.replay, 0)
            tasks.start_soon(world.replay, None, world.elsewhere)
            await anyio.sleep(1)
            await scribe.write()
            await scribe.done()

    return act


async def following_a_dead_writer(world: World) -> Act:
    await world.dead_writer()
    return world.replay


async def sweeping(world: World) -> Act:
    async with world.one_more_manager(ttl=timedelta(seconds=1)) as forgetful, forgetful.open("expired") as stream:
        await stream.done()
    await anyio.sleep(2)
    return world.streams.sweep


async def closing_the_manager(world: World) -> Act:
    scribe = await _writer(world)
    world.told.news = (StreamManagerClosedError,)

    async def follow() -> None:
        with suppress(StreamManagerClosedError):
            await world.replay()

    async def act() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.sleep(1)
            scribe.write_soon()
            await world.streams.aclose()

    return act


async def a_managers_whole_life(world: World) -> Act:
    scribe = world.scribe()

    async def act() -> None:
        async with world.one_more_manager() as streams:
            await scribe.open(streams)
            scribe.write_soon()
            async with streams.subscribe(STREAM):
                await scribe.write()

    world.told.news = (StreamManagerClosedError,)
    return act


async def a_storages_whole_life(world: World) -> Act:
    async def act() -> None:
        async with world.one_more_storage() as storage:
            assert await storage.commit("another", None, Head(1, 1, b"", 9e9), [b"x"])
            async with storage.watch("another"):
                page = await storage.read("another", 0, 9)
            assert page is not None
            assert await storage.delete("another", page.head.version)

    return act


async def _writer(world: World, streams: StreamManager | None = None) -> Scribe:
    """Give a scribe who has opened the stream, and written a chunk."""
    scribe = world.scribe()
    await scribe.open(streams or world.streams)
    await scribe.write()
    return scribe


async def _in_a_block(world: World, work: Callable[[Scribe], Awaitable[None]]) -> None:
    scribe = world.scribe()
    async with world.streams.open(STREAM) as stream:
        scribe.hold(stream)
        del stream
        await work(scribe)


SCENARIOS: Final[tuple[Scenario, ...]] = (
    opening,
    opening_under_a_key,
    replacing,
    opening_what_has_expired,
    resuming,
    resuming_what_is_not_there,
    taking_over_from_a_dead_writer,
    writing,
    writing_after_a_take_over,
    several_writing_at_once,
    writing_soon,
    flushing,
    finishing,
    failing,
    closing,
    leaving_the_block,
    leaving_the_block_when_done,
    leaving_the_block_by_an_exception,
    leaving_the_block_by_cancellation,
    outliving_the_lease,
    cancelling,
    hearing_of_a_cancellation_elsewhere,
    deleting,
    asking,
    replaying,
    following,
    writing_to_followers,
    following_a_dead_writer,
    sweeping,
    closing_the_manager,
    a_managers_whole_life,
    a_storages_whole_life,
)
