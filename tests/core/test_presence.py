"""Who is at a stream, as far as a process knows."""

from collections.abc import Callable
from math import inf

import anyio
from tests.core.helpers import Process

from streamkeep import StreamManager


async def test_a_writer_is_here_elsewhere_or_none(streams: StreamManager, elsewhere: StreamManager) -> None:
    async with streams.open("s") as stream:
        info = await elsewhere.info("s")
        assert (streams.presence(info).writer, elsewhere.presence(info).writer) == ("here", "elsewhere")
        await stream.close()
    released = await elsewhere.info("s")
    assert (streams.presence(released).writer, elsewhere.presence(released).writer) == ("none", "none")


async def test_a_writer_that_lives_is_never_silent_for_long_and_one_that_died_is(
    mortal: Process, streams: StreamManager
) -> None:
    held = await mortal.streams.open("s")
    info = await streams.info("s")
    for _ in range(60):
        presence = streams.presence(info)
        assert presence.silent < 0.6 * presence.dead_after
        await anyio.sleep(1)

    mortal.die()
    await anyio.sleep(60)

    presence = streams.presence(info)
    assert presence.silent >= presence.dead_after == 15.0
    mortal.come_back()
    assert (await streams.info("s")).status == "error"
    held.write_soon  # noqa: B018 - it lives until here


async def test_a_writer_whose_process_has_said_goodbye_is_silent_for_ever(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    await elsewhere.open("s")
    info = await streams.info("s")
    await elsewhere.aclose()
    streams.presence(info)
    await anyio.sleep(5)
    assert streams.presence(info).silent == inf


async def test_readers_are_those_that_follow_in_this_process(streams: StreamManager, elsewhere: StreamManager) -> None:
    async with streams.open("s") as stream:
        await stream.write(1)
        info = await streams.info("s")
        async with (
            streams.subscribe("s"),
            streams.subscribe("s"),
            elsewhere.subscribe("s"),
            streams.subscribe("s", follow=False),
        ):
            assert (streams.presence(info).readers, elsewhere.presence(info).readers) == (2, 1)
        assert streams.presence(info).readers == 0
        await stream.done()


async def test_a_subscription_says_when_what_it_read_last_was_written(
    streams: StreamManager, elsewhere: StreamManager, clock: Callable[[], float]
) -> None:
    async with streams.open("s") as stream, elsewhere.subscribe("s") as events:
        for _ in range(3):
            await anyio.sleep(10)
            written_at = clock()
            await stream.write(1)
            await anyio.sleep(1)
            await anext(events)
            assert 0 <= events.updated_at - written_at < 0.1
        await stream.done()
