"""Hearing of what was stored in JetStream."""

import asyncio
from typing import Final

from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.nats._client import Message
from streamkeep.storages.nats._link import Connection, translating_refusals

_STREAMS_KEPT: Final = 10_000


class Bells:
    """Hears of every message that was stored, and rings.

    JetStream publishes the headers of each message once more when it is stored (*republish*), in the order of its log. Such a message may
    get lost, with the leader that should have sent it or on the way; then the next one shows a gap, or the look that is taken every two
    seconds does, and everybody is rung.
    """

    def __init__(self, name: str, doorbells: Doorbells[str]) -> None:
        self._name = name
        self._doorbells = doorbells
        self._wanted = False
        self._listening = asyncio.Lock()
        self._connection: Connection | None = None
        self._heard = 0
        self._stored = 0
        self._expected: dict[str, int] = {}

    def expect(self, token: str, sequence: int) -> None:
        """Note that a stream has a message there."""
        if len(self._expected) >= _STREAMS_KEPT:
            self._expected.clear()
        self._expected[token] = max(sequence, self._expected.get(token, 0))

    def expected(self, token: str) -> int:
        """Say where a stream has a message that was heard of."""
        return self._expected.get(token, 0)

    async def listen(self, connection: Connection) -> None:
        """Hear from now on."""
        self._wanted = True
        async with self._listening:
            if self._connection is connection:
                return
            await connection.subscribe(f"{self._name}.bell.>", self._bell)
            # Asked by the way that the subscription went: when the leader has answered, it knows that somebody listens.
            self._heard = self._stored = await self._last_sequence(connection)
            self._connection = connection

    async def connected(self, connection: Connection) -> None:
        """Go on with a new connection."""
        self._expected.clear()
        if self._wanted:
            await self.listen(connection)
            self._doorbells.ring_all()

    def check(self, connection: Connection, last_sequence: int) -> None:
        """Ring everybody if a bell was lost. JetStream's log has a message there."""
        if not self._doorbells or self._connection is not connection:
            return
        if self._heard < self._stored:
            self._heard = self._stored
            self._doorbells.ring_all()
        self._stored = last_sequence

    async def _last_sequence(self, connection: Connection) -> int:
        with translating_refusals():
            info = await connection.api(f"STREAM.INFO.{self._name}")
        sequence: int = info["state"]["last_seq"]
        return sequence

    def _bell(self, message: Message) -> None:
        try:
            sequence = int(message.headers["Nats-Sequence"])
            _, _, kind, *_, token = message.subject.split(".")
        except (KeyError, ValueError):
            return  # somebody else's
        if kind == "s":
            self.expect(token, sequence)
        if sequence > self._heard + 1:
            self._doorbells.ring_all()
        elif kind == "s":
            self._doorbells.ring((token,))
        self._heard = max(self._heard, sequence)
