"""Reading streams out of JetStream: what the head is, and the records from an offset on.

What the last message of a stream is, only the leader of the JetStream stream can say: a *direct get* may be answered by a replica that is
behind. What lies before the last message never changes; that may come from any replica, a page a request, and what a replica does not have
yet is asked of the leader.

Messages are found by their place in JetStream's log, which all streams share, so the place of an offset has to be searched: between two
places that are known, guessing in proportion and halving in turns. Whoever reads on where a page ended searches nothing.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from streamkeep.errors import StorageCorruptError
from streamkeep.storage import PAGE_BYTES
from streamkeep.storages.nats._commits import Commit, Piece, decode_commit, decode_piece, decode_records
from streamkeep.storages.nats._link import NO_MESSAGE, ApiError, ChangedError, Connection

_STREAMS_KEPT: Final = 1_000
_PLACES_KEPT: Final = 8
_MAX_BATCH: Final = 1_000
_LAST_IN_A_ROW: Final = 100
_MAX_ENDS: Final = 1_000
_ENDS_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Last:
    """The end of a stream: where its last message is (0: nowhere), and its last commit (None: it does not exist)."""

    sequence: int
    commit: Commit | None = None
    pieces: Sequence[Piece] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a commit is: its offsets, and its messages."""

    start: int
    tail: int
    begin: int
    end: int


class Log:
    """Reads the streams that are kept in one JetStream stream."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: dict[str, tuple[int, list[_Place]]] = {}

    def forget(self) -> None:
        """Forget where things are: the server may have lost the last of them."""
        self._places.clear()

    async def last(self, connection: Connection, subject: str) -> Last:
        """Give the end of a stream, as the leader knows it."""
        piece = await self._get(connection, last_by_subj=subject)
        if piece is None:
            return Last(0)
        sequence = piece.sequence
        for _ in range(_LAST_IN_A_ROW):
            if piece is None or piece.is_deletion:
                return Last(sequence)
            if piece.number == piece.last:
                return Last(sequence, *await self._commit(connection, [piece]))
            # A server that is killed while it stores a batch may leave the first pieces of it: nothing was acknowledged.
            piece = await self._last_before(connection, subject, piece.begin)
        raise StorageCorruptError(f"the stream at {subject} ends with too many commits that are not whole")

    async def ends(self, connection: Connection, subjects: Sequence[str]) -> Mapping[str, Last]:
        """Give the ends of many streams, as some replica knows them: of those whose last message says all, and only of them."""
        ends: dict[str, Last] = {}
        for some in _parted(subjects, connection.room):
            begin = 1
            while True:
                body = {"multi_last": some, "seq": begin, "batch": len(some), "max_bytes": _ENDS_BYTES}
                batch = await connection.request_batch(f"$JS.API.DIRECT.GET.{self._name}", msgspec.json.encode(body))
                for message in batch.messages:
                    headers = message.headers
                    begin = int(headers["Nats-Sequence"]) + 1
                    with suppress(StorageCorruptError):
                        piece = decode_piece(begin - 1, message.data)
                        if piece.number == piece.last and not piece.is_deletion and (commit := decode_commit([piece])):
                            ends[headers["Nats-Subject"]] = Last(piece.sequence, commit)
                if not batch.pending or not batch.messages:
                    break
        return ends

    async def records(
        self, connection: Connection, subject: str, last: Last, start: int, limit: int, *, leader: bool
    ) -> Sequence[bytes]:
        """Give the records from `start` on up to the last commit; ChangedError if it cannot be done any more."""
        commit = last.commit
        assert commit is not None
        page = _Page(start, limit)
        if page.is_full or not commit.head.first <= start < commit.tail:
            return page.records
        if start < commit.start:
            begin = await self._find(connection, subject, commit, start)
            async with aclosing(self._walk(connection, subject, commit, begin, page, leader=leader)) as commits:
                async for found, pieces in commits:
                    page.add(found, pieces)
                    self._remember(subject, found)
        if not page.is_full:
            pieces = last.pieces
            while pieces[0].number:
                pieces = [await self._at(connection, pieces[0].sequence - 1), *pieces]
            page.add(commit, pieces)
            self._remember(subject, commit)
        return page.records

    async def begin_of(self, connection: Connection, subject: str, last: Commit, offset: int) -> int:
        """Give a place before which no message of the stream holds the record at `offset`, or any later one."""
        return last.begin if offset >= last.start else await self._find(connection, subject, last, offset)

    async def _walk(
        self, connection: Connection, subject: str, last: Commit, begin: int, page: "_Page", *, leader: bool
    ) -> AsyncGenerator[tuple[Commit, Sequence[Piece]]]:
        """Give the commits before the last one, until the page is full."""
        pieces: list[Piece] = []
        offset = page.offset
        while offset < last.start and not page.is_full:
            messages = await self._next_few(connection, subject, begin, page.limit, leader=leader)
            if not messages or messages[0].sequence >= last.begin:
                messages = await self._next_few(connection, subject, begin, 1, leader=True)
            if not messages or messages[0].sequence >= last.begin:
                raise ChangedError
            for piece in messages:
                if page.is_full or piece.sequence >= last.begin:
                    return
                begin = piece.sequence + 1
                pieces = _joined(pieces, piece)
                if not pieces or piece.number != piece.last:
                    continue
                commit = decode_commit(pieces)
                if commit is None or commit.first != last.first or (commit.tail > offset and commit.start > offset):
                    raise ChangedError
                if commit.tail > offset:
                    offset = commit.tail
                    yield commit, pieces
                pieces = []

    async def _find(self, connection: Connection, subject: str, last: Commit, start: int) -> int:
        """Give a place from which on the commit is found that holds the record at `start`, and no long way before it."""
        offset, begin, end_offset, end = self._nearest(subject, last, start)
        halve = False
        while offset < start:
            if begin >= end:
                raise ChangedError
            ahead = (end - begin) // 2 if halve else (end - begin) * (start - offset) // (end_offset - offset)
            guess = min(begin + ahead, end - 1)
            halve = not halve
            piece = await self._get(connection, seq=guess, next_by_subj=subject)
            if piece is None or piece.begin >= end:
                end = guess
                continue
            commit, _ = await self._commit(connection, [await self._at(connection, piece.end)])
            if commit.first != last.first:
                raise ChangedError
            if commit.start <= start < commit.tail:
                return commit.begin
            if commit.tail <= start:
                offset, begin = commit.tail, commit.end + 1
            else:
                end_offset, end = commit.start, guess
        return begin

    def _nearest(self, subject: str, last: Commit, start: int) -> tuple[int, int, int, int]:
        """Give an offset up to `start` and its place, and a greater offset and its place, as near as they are known."""
        offset, begin, end_offset, end = 0, last.first, last.start, last.begin
        for place in self._known(subject, last):
            if place.start <= start < place.tail:
                return start, place.begin, place.tail, place.end
            if offset < place.tail <= start:
                offset, begin = place.tail, place.end + 1
            if start < place.start < end_offset:
                end_offset, end = place.start, place.begin
        return offset, begin, end_offset, end

    def _known(self, subject: str, last: Commit) -> Sequence[_Place]:
        first, places = self._places.get(subject, (0, []))
        return [place for place in places if place.end < last.begin] if first == last.first else []

    def _remember(self, subject: str, commit: Commit) -> None:
        first, places = self._places.pop(subject, (commit.first, []))
        if first != commit.first:
            places = []
        place = _Place(commit.start, commit.tail, commit.begin, commit.end)
        # The place behind which somebody reads on moves on with him.
        places = [known for known in places if known.tail != place.start and known != place][-_PLACES_KEPT + 1 :]
        self._places[subject] = (commit.first, [*places, place])
        if len(self._places) > _STREAMS_KEPT:
            del self._places[next(iter(self._places))]

    async def _commit(self, connection: Connection, pieces: list[Piece]) -> tuple[Commit, Sequence[Piece]]:
        """Give the commit that ends with this piece, and as many of its pieces as were needed to know it."""
        while (commit := decode_commit(pieces)) is None:
            if not pieces[0].number:
                raise StorageCorruptError(f"message {pieces[0].sequence} of the JetStream stream is damaged: it has no foot")
            pieces.insert(0, await self._at(connection, pieces[0].sequence - 1))
        return commit, pieces

    async def _at(self, connection: Connection, sequence: int) -> Piece:
        piece = await self._get(connection, seq=sequence)
        if piece is None:
            raise ChangedError
        return piece

    async def _get(self, connection: Connection, **which: object) -> Piece | None:
        """Ask the leader for one message."""
        message = await connection.request(f"$JS.API.STREAM.MSG.GET.{self._name}", msgspec.json.encode(which))
        answer = msgspec.json.decode(message.data, type=_Got)
        if answer.message is not None:
            return decode_piece(answer.message.seq, answer.message.data)
        error = answer.error or _Refusal(0, "no answer")
        if error.err_code == NO_MESSAGE:
            return None
        raise ApiError(error.err_code, error.description)

    async def _last_before(self, connection: Connection, subject: str, sequence: int) -> Piece | None:
        body = {"multi_last": [subject], "up_to_seq": sequence - 1}
        found = await self._direct(connection, body) if sequence > 1 else []
        return found[0] if found else None

    async def _next_few(self, connection: Connection, subject: str, begin: int, limit: int, *, leader: bool) -> Sequence[Piece]:
        """Give the next messages of a stream, in order: one of the leader's, or what any replica has."""
        if leader:
            piece = await self._get(connection, seq=begin, next_by_subj=subject)
            return [] if piece is None else [piece]
        count = min(max(limit, 1), _MAX_BATCH)
        return await self._direct(connection, {"seq": begin, "next_by_subj": subject, "batch": count, "max_bytes": PAGE_BYTES})

    async def _direct(self, connection: Connection, body: Mapping[str, object]) -> Sequence[Piece]:
        batch = await connection.request_batch(f"$JS.API.DIRECT.GET.{self._name}", msgspec.json.encode(body))
        return [decode_piece(int(message.headers["Nats-Sequence"]), message.data) for message in batch.messages]


class _Page:
    """The records that a read gathers."""

    def __init__(self, start: int, limit: int) -> None:
        self.records: list[bytes] = []
        self.limit = limit
        self.offset = start
        self._size = 0

    @property
    def is_full(self) -> bool:
        return len(self.records) >= self.limit or self._size >= PAGE_BYTES

    def add(self, commit: Commit, pieces: Sequence[Piece]) -> None:
        for record in decode_records(commit, pieces)[self.offset - commit.start :]:
            if self.is_full:
                return
            self.records.append(record)
            self.offset += 1
            self._size += len(record)


class _Stored(msgspec.Struct):
    seq: int
    data: bytes = b""  # base64 in JSON, which msgspec undoes


class _Refusal(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Got(msgspec.Struct):
    message: _Stored | None = None
    error: _Refusal | None = None


def _parted(subjects: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Give them a few at a time, as many as one request may name."""
    some: list[str] = []
    room = size
    for subject in subjects:
        if len(some) == _MAX_ENDS or (some and room < len(subject) + 4):
            yield some
            some, room = [], size
        some.append(subject)
        room -= len(subject) + 4
    if some:
        yield some


def _joined(pieces: list[Piece], piece: Piece) -> list[Piece]:
    """Add a piece to those of its commit; what is not whole is left out."""
    if piece.number == 0:
        return [piece]
    if pieces and pieces[-1].sequence + 1 == piece.sequence and pieces[-1].number + 1 == piece.number:
        return [*pieces, piece]
    return []
