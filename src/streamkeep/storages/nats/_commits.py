"""How a commit lies in JetStream: as one message, or as a few that follow one another when it is larger than the server takes.

Pure functions from bytes to values: no connection, no event loop. A message is a prefix and a piece of the commit; the commit is its
records, one behind the other, and then its *foot*: the head, and where the records end. So the last piece alone usually says what the
head is, however large the records are. A message that deletes a stream is a prefix alone.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final
from urllib.parse import quote, unquote

import msgspec

from streamkeep.errors import StorageCorruptError
from streamkeep.storage import Head
from streamkeep.storages._ids import id_bytes

_PREFIX: Final = struct.Struct(">BHH")  # the kind, the number of this piece from 0 on, and of the commit's last piece
_FOOT_SIZE: Final = struct.Struct(">I")
_COMMIT: Final = 1
_DELETION: Final = 2

DELETION: Final = _PREFIX.pack(_DELETION, 0, 0)
MAX_PIECES: Final = 1_000
"""How many messages JetStream takes in one atomic batch."""


class Piece(msgspec.Struct, frozen=True):
    """A message of a stream, with its place in JetStream's log."""

    sequence: int
    number: int
    last: int
    data: bytes
    is_deletion: bool

    @property
    def begin(self) -> int:
        """Where the first piece of this commit is."""
        return self.sequence - self.number

    @property
    def end(self) -> int:
        """Where the last piece of this commit is."""
        return self.begin + self.last


class _Foot(msgspec.Struct, frozen=True, array_like=True):
    version: int
    tail: int
    state: bytes
    expires_at: float
    marker: int
    first: int
    sizes: list[int]
    kept: int = 0  # the head's `first`


class Commit(msgspec.Struct, frozen=True):
    """What is known of a commit from its last piece, or its last few."""

    foot: _Foot
    begin: int
    end: int

    @property
    def head(self) -> Head:
        """The head that it wrote."""
        return Head(self.foot.version, self.foot.tail, self.foot.state, self.foot.expires_at, self.foot.kept)

    @property
    def marker(self) -> int:
        """Where the marker is that says when the stream expires."""
        return self.foot.marker

    @property
    def first(self) -> int:
        """Where the commit begins that created the stream: what is deleted and created again is another one."""
        return self.foot.first or self.begin

    @property
    def start(self) -> int:
        """The offset of its first record."""
        return self.foot.tail - len(self.foot.sizes)

    @property
    def tail(self) -> int:
        """The offset behind its last record."""
        return self.foot.tail


def encode(head: Head, records: Sequence[bytes], marker: int, first: int, piece_bytes: int) -> Sequence[bytes]:
    """Give the messages of a commit. `first` is where the stream's creation begins, 0 in the creation itself."""
    sizes = [len(record) for record in records]
    foot = msgspec.msgpack.encode(_Foot(head.version, head.tail, head.state, head.expires_at, marker, first, sizes, head.first))
    whole = b"".join((*records, foot, _FOOT_SIZE.pack(len(foot))))
    pieces = [whole[begin : begin + piece_bytes] for begin in range(0, len(whole), piece_bytes)]
    return [_PREFIX.pack(_COMMIT, number, min(len(pieces) - 1, 0xFFFF)) + piece for number, piece in enumerate(pieces[:0xFFFF])]


def decode_piece(sequence: int, message: bytes) -> Piece:
    """Give what a message is. StorageCorruptError if it is nothing of ours."""
    try:
        kind, number, last = _PREFIX.unpack_from(message)
    except struct.error:
        kind = number = last = 0
    if kind not in {_COMMIT, _DELETION}:
        raise StorageCorruptError(
            f"message {sequence} of the JetStream stream was not written by streamkeep, or by a newer version of it"
        )
    return Piece(sequence, number, last, message[_PREFIX.size :], kind == _DELETION)


def decode_commit(pieces: Sequence[Piece]) -> Commit | None:
    """Give the commit whose last pieces these are, or None if its foot begins before them."""
    data = pieces[0].data if len(pieces) == 1 else b"".join(piece.data for piece in pieces)
    foot = _foot_of(pieces[-1].sequence, data)
    return None if foot is None else Commit(foot, pieces[0].begin, pieces[-1].sequence)


def decode_records(commit: Commit, pieces: Sequence[Piece]) -> Sequence[bytes]:
    """Give the records of a commit from all of its pieces."""
    data = pieces[0].data if len(pieces) == 1 else b"".join(piece.data for piece in pieces)
    return [data[begin:end] for begin, end in pairwise(accumulate(commit.foot.sizes, initial=0))]


def token_of(stream: str) -> str:
    """Give the one token of a subject that stands for an id: as it is, if it has neither dots nor anything but plain ASCII."""
    return quote(id_bytes(stream), safe="").replace(".", "%2E")


def stream_of(token: str) -> str:
    """Give the id back."""
    return unquote(token)


def _foot_of(sequence: int, data: bytes) -> _Foot | None:
    if len(data) < _FOOT_SIZE.size:
        return None
    end = len(data) - _FOOT_SIZE.size
    begin = end - _FOOT_SIZE.unpack_from(data, end)[0]
    if begin < 0:
        return None
    try:
        return msgspec.msgpack.decode(data[begin:end], type=_Foot)
    except msgspec.DecodeError as error:
        raise StorageCorruptError(f"message {sequence} of the JetStream stream is damaged: {error}") from error
