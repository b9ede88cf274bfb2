"""StreamEvent, and the format of a record: one letter for the type, then JSON.

What is stored is what is sent: a record's JSON is decoded only when somebody asks for the object.
"""

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Generic, Protocol, TypeVar, cast, get_args

import msgspec

from ._encoding import Encode, JSONEncoding
from ._sse_text import check_no_sse_text
from .errors import STATUSES, InvalidArgumentError, PublicError, Status, StorageCorruptError, StreamkeepError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class StreamEventType(StrEnum):
    """Chunks, then at most one DONE or ERROR; of a stream that is gone on with when its writer has died, also RECOVERING and RESTARTED.

    RECOVERING: its writer is gone, and another one is to go on. RESTARTED: the answer begins again; what came before is superseded.
    """

    CHUNK = "chunk"
    RECOVERING = "recovering"
    RESTARTED = "restarted"
    DONE = "done"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a stream ended in ERROR. All but `internal` may be shown to clients."""

    status: Status
    message: str
    details: Any = None
    internal: str = field(default="", repr=False)
    """The producer's exception in full, for those who run the service; never sent."""


class StreamEvent(msgspec.Struct, Generic[T], frozen=True):
    """One event of a stream: its type, its offset in the log (from 0), and its JSON as it is stored."""

    type: StreamEventType
    offset: int
    data: bytes
    _decode_chunk: Callable[[bytes], T] = msgspec.json.decode
    _decode_output: Callable[[bytes], Any] = msgspec.json.decode

    def __repr__(self) -> str:
        return f"StreamEvent({self.type.name}, offset={self.offset}, data={self.data!r})"

    @property
    def is_terminal(self) -> bool:
        """Whether the stream ends with it."""
        return self.type in {StreamEventType.DONE, StreamEventType.ERROR}

    @property
    def chunk(self) -> T:
        """The chunk, decoded anew at each call; AttributeError unless the type is CHUNK."""
        self._must_be(StreamEventType.CHUNK)
        return self._decode_chunk(self.data)

    @property
    def output(self) -> Any:
        """What the producer gave to `done`; AttributeError unless the type is DONE."""
        self._must_be(StreamEventType.DONE)
        return self._decode_output(self.data)

    @property
    def attempt(self) -> int:
        """How many writers of the stream have died by now; AttributeError unless the type is RECOVERING."""
        self._must_be(StreamEventType.RECOVERING)
        return _recovering_decoder.decode(self.data).attempt

    @property
    def error(self) -> ErrorInfo:
        """Why the stream failed; AttributeError unless the type is ERROR."""
        self._must_be(StreamEventType.ERROR)
        return _error_decoder.decode(self.data)

    def _must_be(self, type_: StreamEventType) -> None:
        if self.type is not type_:
            raise AttributeError(f"the event at offset {self.offset} is of type {self.type}, not {type_}")


class _Recovering(msgspec.Struct):
    attempt: int


_error_decoder: Final = msgspec.json.Decoder(ErrorInfo)
_recovering_decoder: Final = msgspec.json.Decoder(_Recovering)

MAX_ERROR_TEXT: Final = 64 * 1024
"""How much of an exception's text is kept, so that a stream can always be told of its end."""

MAX_OFFSET: Final = 2**53 - 1
"""The greatest offset that a JavaScript client can name."""

encode_json: Final = JSONEncoding()
"""Encodes where nothing else was said."""

_QUOTE: Final = ord('"')
_LAST: Final = b"nr"  # of a string that ends in a line end: only such is worth decoding

_CHUNK: Final = b"c"
_RECOVERING: Final = b"r"
_RESTARTED: Final = b"s"
_DONE: Final = b"d"
_ERROR: Final = b"e"
_TYPE_OF: Final[Mapping[bytes, StreamEventType]] = {
    _CHUNK: StreamEventType.CHUNK,
    _RECOVERING: StreamEventType.RECOVERING,
    _RESTARTED: StreamEventType.RESTARTED,
    _DONE: StreamEventType.DONE,
    _ERROR: StreamEventType.ERROR,
}


def chunk_record(chunk: object, encode: Encode = encode_json) -> bytes:
    """Give the record of a chunk. InvalidArgumentError: the value is not JSON, or is server-sent events already."""
    data = encode(chunk)
    if data[0] == _QUOTE and (type(chunk) is not str or data[-2] in _LAST):
        _check_no_sse(chunk, data, encode)
    return _CHUNK + data


def _check_no_sse(chunk: object, data: bytes, encode: Encode) -> None:
    if type(chunk) is msgspec.Raw:  # JSON that is ready comes from somebody who knows what it is
        return
    if isinstance(chunk, bytes | bytearray | memoryview):
        text = str(chunk, "latin-1") if isinstance(encode, JSONEncoding) else ""
    else:
        text = msgspec.json.decode(data, type=str)
    check_no_sse_text(text)


def done_record(output: object, encode: Encode = encode_json) -> bytes:
    """Give the record that ends a stream well. InvalidArgumentError: the value is not JSON."""
    return _DONE + encode(output)


def error_record(error: ErrorInfo) -> bytes:
    """Give the record that ends a stream in failure. InvalidArgumentError: nobody could read it."""
    data = encode_json(error)
    try:
        _error_decoder.decode(data)
    except msgspec.ValidationError as why:
        raise InvalidArgumentError(f"this is not an ErrorInfo: {why}") from why
    return _ERROR + data


RESTARTED_RECORD: Final = _RESTARTED + b"{}"


def recovering_record(attempt: int) -> bytes:
    """Give the record that says that a stream's writer is gone, as so many before it, and another one is to go on."""
    return _RECOVERING + msgspec.json.encode(_Recovering(attempt))


def is_error(record: bytes) -> bool:
    """Say whether a stream ends in failure with this record."""
    return record[:1] == _ERROR


def is_terminal(record: bytes) -> bool:
    """Say whether a stream ends with this record."""
    return record[:1] in (_DONE, _ERROR)


def event_of(
    record: bytes,
    offset: int,
    decode_chunk: Callable[[bytes], T] = msgspec.json.decode,
    decode_output: Callable[[bytes], Any] = msgspec.json.decode,
) -> StreamEvent[T]:
    """Give the event that a record holds. StorageCorruptError: it is none of ours."""
    type_ = _TYPE_OF.get(record[:1])
    if type_ is None:
        raise StorageCorruptError(f"the record at offset {offset} is not one of streamkeep's")
    return StreamEvent(type_, offset, record[1:], decode_chunk, decode_output)


class Validator(Protocol[T_co]):
    """What pydantic's `TypeAdapter` is: it reads what is no class, such as the union of all events of an SDK."""

    def validate_json(self, data: bytes, /) -> T_co:
        """Give what the JSON holds."""
        ...


ReadAs = type[T] | Validator[T]
"""What JSON is decoded into."""


def decoder_of(type_: ReadAs[T]) -> Callable[[bytes], T]:
    """Give what decodes JSON into a pydantic model, or a list, an optional or a union of such; by a `TypeAdapter`; or into what msgspec
    knows: dataclasses, structs, TypedDicts.
    """
    for name in ("model_validate_json", "validate_json"):
        validate: Callable[[bytes], T] | None = getattr(type_, name, None)
        if validate is not None:
            return validate
    if _holds_model(type_):
        adapter: Validator[T] = sys.modules["pydantic"].TypeAdapter(type_)
        return adapter.validate_json
    return msgspec.json.Decoder(cast("type[T]", type_)).decode


def _holds_model(type_: object) -> bool:
    return hasattr(type_, "model_validate_json") or any(map(_holds_model, get_args(type_)))


def error_info(error: BaseException) -> ErrorInfo:
    """Say of an exception what readers may know: status always, message and details only if it was marked public.

    Public are `PublicError`, Genkit's `PublicError` and `UserFacingError` (known by name and attributes, because Genkit need not be
    installed), and the public errors of this package. Of all others readers see the status in words: its `status`;
    RESOURCE_EXHAUSTED where SDKs of language models say that their provider is asked too much, by a `status_code` of 429; INTERNAL
    without any.
    """
    try:
        internal = _storable("".join(traceback.format_exception(error)))[-MAX_ERROR_TEXT:]
    except Exception as failure:  # as in `shown_info`
        internal = f"{type(error).__qualname__}, which cannot be written down: {type(failure).__qualname__}"
    return replace(shown_info(error), internal=internal)


def shown_info(error: BaseException) -> ErrorInfo:
    """Say the same without the exception in full, which takes longer to write down than all the rest."""
    try:
        return _shown_info(error)
    except Exception:  # its attributes are somebody else's code; a stream has to end all the same
        return hidden_error("INTERNAL", "")


def _shown_info(error: BaseException) -> ErrorInfo:
    status = _status_of(error)
    if not is_public(error):
        return hidden_error(status, "")
    message = str(getattr(error, "original_message", None) or error)
    details: Any = getattr(error, "details", None)
    if isinstance(details, dict) and not isinstance(error, StreamkeepError):
        details = {
            key: value for key, value in details.items() if key != "stack"
        }  # Genkit adds it, and it is for nobody outside
    return public_info(status, message, details)


def public_info(status: Status, message: str, details: object = None) -> ErrorInfo:
    """Give an error that readers are told in full, as far as it can be: text of Unicode that is not too long, details that are JSON."""
    return ErrorInfo(status, _storable(message)[:MAX_ERROR_TEXT], _json_or_none(details))


def _status_of(error: BaseException) -> Status:
    # Of what a provider of models answers only this one: that it does not know the app, or not what is asked for, is no reader's fault.
    if getattr(error, "status_code", None) == 429:
        return "RESOURCE_EXHAUSTED"
    status = STATUSES.get(str(getattr(error, "status", None)), "INTERNAL")
    is_providers = type(error).__module__.startswith("google.genai.")  # whose errors have the words that Genkit's have
    return "INTERNAL" if is_providers and status != "RESOURCE_EXHAUSTED" else status


def hidden_error(status: Status, internal: str) -> ErrorInfo:
    """Give an error of which readers see the status only, in words."""
    return ErrorInfo(status, status.lower().replace("_", " "), None, internal)


def is_public(error: BaseException) -> bool:
    """Say whether an exception's text is for everybody; see `error_info`."""
    match error:
        case PublicError():
            return True
        case StreamkeepError():
            return error.public
        case _:
            names = {class_.__name__ for class_ in type(error).__mro__}
            return hasattr(error, "status") and bool(names & {"PublicError", "UserFacingError"})


def _storable(text: str) -> str:
    # An exception may quote what was no UTF-8, as lone surrogates; it must not be lost for that.
    return text.encode(errors="backslashreplace").decode()


def _json_or_none(value: object) -> object:
    try:
        data = encode_json([value])  # one level deeper, as it will be
    except InvalidArgumentError:
        return None
    return msgspec.json.decode(data)[0] if len(data) <= MAX_ERROR_TEXT else None
