"""The flows that the servers under test run, of every temper. Each counts, so that a reader knows what it has missed."""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import anyio
import anyio.lowlevel

PROCESS: Final = "x-process"
"""The header in which an answer says which process gives it."""
PAUSE_SECONDS: Final = 0.02
SHORT: Final = 10
PADDING: Final = "x" * 200_000


class Stop(Protocol):
    """An event, of asyncio or of anyio, that is set when the flow should stop."""

    def is_set(self) -> bool: ...


SendChunk = Callable[[object], object]
Flow = Callable[[SendChunk, Stop], Awaitable[object]]


async def short(send: SendChunk, _stop: Stop) -> int:
    """Be done well within any drain, and return how many chunks there are."""
    for number in range(SHORT):
        send(number)
        await anyio.sleep(PAUSE_SECONDS)
    return SHORT


async def endless(send: SendChunk, _stop: Stop) -> None:
    """Go on for ever, and ignore being told to stop."""
    number = 0
    while True:
        send(number)
        number += 1
        await anyio.sleep(PAUSE_SECONDS)


async def quiet(send: SendChunk, _stop: Stop) -> None:
    """Say one thing, and nothing more for ever."""
    send(0)
    await anyio.sleep_forever()


async def minding(send: SendChunk, stop: Stop) -> None:
    """Raise when told to stop."""
    number = 0
    while not stop.is_set():
        send(number)
        number += 1
        await anyio.sleep(PAUSE_SECONDS)
    raise InterruptedError


async def tidy(send: SendChunk, stop: Stop) -> None:
    """Take a while to clean up when cancelled."""
    try:
        await endless(send, stop)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10 * PAUSE_SECONDS)


async def broad(send: SendChunk, _stop: Stop) -> None:
    """Send more than the buffers between here and a reader hold, and then nothing for ever."""
    for number in range(40):
        send(f"{number} {PADDING}")
        await anyio.lowlevel.checkpoint()
    await anyio.sleep_forever()


FLOWS: Final[dict[str, Flow]] = {flow.__name__: flow for flow in (short, endless, quiet, minding, tidy, broad)}


def number_of(chunk: object) -> int:
    """Give the number that a chunk carries, which is its offset."""
    return int(str(chunk).partition(" ")[0])
