"""Notifications of what was stored in JetStream."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.nats._client import Message
from streamkeep.storages.nats._link import Connection

_STREAMS_KEPT: Final = 10_000


class Notifications:
    """Is notified of every message that was stored, and rings.

    JetStream publishes the headers of each message once more when it is stored (*republish*), in the order of its log. Such a notification
    may get lost, with the leader that should have sent it or on the way; then the next one shows a gap, or the look that is taken every
    two seconds does, and everybody is rung.
    """

    def __init__(self, name: str, doorbells: Doorbells[str]) -> None:
        self._name = name
        self._doorbells = doorbells
        self._is_wanted = False
        self._listening = asyncio.Lock()
        self._connection: Connection | None = None
        self._notified = 0
        self._stored = 0
        self._expected: dict[str, int] = {}
        self._created: object = None
        self._last_sequence = 0

    def expect(self, token: str, sequence: int) -> None:
        """Note that a stream has a message there."""
        if len(self._expected) >= _STREAMS_KEPT:
            self._expected.clear()
        self._expected[token] = max(sequence, self._expected.get(token, 0))

    def forget(self, token: str) -> None:
        """Expect nothing of a stream."""
        self._expected.pop(token, None)

    def expected(self, token: str) -> int:
        """Say where a stream is known to have a message."""
        return self._expected.get(token, 0)

    async def listen(self, connection: Connection) -> None:
        """Subscribe, unless that has been done."""
        self._is_wanted = True
        async with self._listening:
            if self._connection is connection:
                return
            await connection.subscribe(f"{self._name}.bell.>", self._stored_message)
            # Asked by the way that the subscription went: when the leader has answered, it knows that somebody listens.
            self._notified = self._stored = await self._ask_last_sequence(connection)
            self._connection = connection

    async def connected(self, connection: Connection, info: Mapping[str, Any]) -> None:
        """Go on with a new connection."""
        self._expected.clear()
        self._created, self._last_sequence = info["created"], info["state"]["last_seq"]
        if self._is_wanted:
            await self.listen(connection)
            self._doorbells.ring_all()

    def check(self, connection: Connection, info: Mapping[str, Any]) -> bool:
        """Ring everybody if a notification was lost; say whether JetStream's log is shorter than it was, or another one."""
        last_sequence: int = info["state"]["last_seq"]
        is_another = info["created"] != self._created
        is_shorter = last_sequence < self._last_sequence
        self._created, self._last_sequence = info["created"], last_sequence
        if is_another:
            self._expected.clear()
        if is_another or is_shorter:
            self._notified = self._stored = last_sequence
            self._doorbells.ring_all()
            return True
        if self._doorbells and self._connection is connection:
            if self._notified < self._stored:
                self._notified = self._stored
                self._doorbells.ring_all()
            self._stored = last_sequence
        return False

    async def _ask_last_sequence(self, connection: Connection) -> int:
        info = await connection.api(f"STREAM.INFO.{self._name}")
        self._last_sequence = sequence = int(info["state"]["last_seq"])
        return sequence

    def _stored_message(self, message: Message) -> None:
        try:
            sequence = int(message.headers["Nats-Sequence"])
            _, _, kind, *_, token = message.subject.split(".")
        except (KeyError, ValueError):
            return  # somebody else's
        if kind == "s":
            self.expect(token, sequence)
        if sequence > self._notified + 1:
            self._doorbells.ring_all()
        elif kind == "s":
            self._doorbells.ring((token,))
        self._notified = max(self._notified, sequence)
