"""StreamEvent, and the format of a record: one letter for the type, then JSON.

What is stored is what is sent: a record's JSON is decoded only when somebody asks for the object.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

import msgspec

from .errors import STATUSES, InvalidArgumentError, PublicError, Status, StorageCorruptError, StreamkeepError

T = TypeVar("T")


class StreamEventType(StrEnum):
    """Chunks, then at most one DONE or ERROR."""

    CHUNK = "chunk"
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
    def error(self) -> ErrorInfo:
        """Why the stream failed; AttributeError unless the type is ERROR."""
        self._must_be(StreamEventType.ERROR)
        return _error_decoder.decode(self.data)

    def _must_be(self, type_: StreamEventType) -> None:
        if self.type is not type_:
            raise AttributeError(f"the event at offset {self.offset} is of type {self.type}, not {type_}")


_error_decoder: Final = msgspec.json.Decoder(ErrorInfo)

MAX_ERROR_TEXT: Final = 64 * 1024
"""How much of an exception's text is kept, so that a stream can always be told of its end."""

MAX_OFFSET: Final = 2**53 - 1
"""The greatest offset that a JavaScript client can name."""

MAX_DEPTH: Final = 256
"""How deep JSON may be nested. Python's own limit is met later, differs from version to version, and would be met by whoever reads it."""

_TOO_DEEP: Final = f"the value is circular, or nested more than {MAX_DEPTH} levels deep"

_CHUNK: Final = b"c"
_DONE: Final = b"d"
_ERROR: Final = b"e"
_TYPE_OF: Final[Mapping[bytes, StreamEventType]] = {
    _CHUNK: StreamEventType.CHUNK,
    _DONE: StreamEventType.DONE,
    _ERROR: StreamEventType.ERROR,
}


def chunk_record(chunk: object) -> bytes:
    """Give the record of a chunk. InvalidArgumentError: the value is not JSON."""
    return _CHUNK + encode_json(chunk)


def done_record(output: object) -> bytes:
    """Give the record that ends a stream well. InvalidArgumentError: the value is not JSON."""
    return _DONE + encode_json(output)


def error_record(error: ErrorInfo) -> bytes:
    """Give the record that ends a stream in failure. InvalidArgumentError: nobody could read it."""
    data = encode_json(error)
    try:
        _error_decoder.decode(data)
    except msgspec.ValidationError as why:
        raise InvalidArgumentError(f"this is not an ErrorInfo: {why}") from why
    return _ERROR + data


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


def decoder_of(type_: type[T]) -> Callable[[bytes], T]:
    """Give what decodes JSON into a pydantic model, or into anything that msgspec knows: dataclasses, structs, TypedDicts."""
    validate_json: Callable[[bytes], T] | None = getattr(type_, "model_validate_json", None)
    return validate_json or msgspec.json.Decoder(type_).decode


def encode_json(value: object) -> bytes:
    """Give the value as one line of UTF-8 JSON.

    Beside JSON's own types, dataclasses, msgspec structs, pydantic models (by alias) and what msgspec documents (datetimes, UUIDs,
    enums) are taken. InvalidArgumentError: anything else, NaN and infinities, lone surrogates, and nesting that is circular or deeper than
    256 levels.
    """
    try:
        data = _encoder.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"the value is not JSON: {error}") from error
    except RecursionError as error:  # how deep that is depends on the interpreter
        raise InvalidArgumentError(_TOO_DEEP) from error
    # What has few brackets is not deep: only the rest is worth walking through.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_too_deep(data):
        raise InvalidArgumentError(_TOO_DEEP)
    # The encoder writes null for NaN; only then is it worth walking the value, to refuse what would be read back as another.
    if b"null" in data and _has_non_finite(value):
        raise InvalidArgumentError("the value is not JSON: it holds NaN or an infinity")
    return data


def is_deep(value: object) -> bool:
    """Say whether decoded JSON is nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level for item in _items(container) if isinstance(item, dict | list)]
        if not level:
            return False
    return any(isinstance(container, dict | list) for container in level)


def _items(container: object) -> Iterable[object]:
    match container:
        case dict():
            return container.values()
        case list():
            return container
        case _:
            return ()


def _is_too_deep(data: bytes) -> bool:
    try:
        return is_deep(msgspec.json.decode(data))
    except RecursionError:
        return True


def _encode_model(value: object) -> object:
    if isinstance(value, msgspec.Raw):  # JSON already, which only the search for NaN takes apart
        return msgspec.json.decode(value)
    model_dump: Callable[..., object] | None = getattr(value, "model_dump", None)
    if model_dump is None:
        raise TypeError(f"{type(value).__qualname__} has no JSON form")
    try:
        return model_dump(mode="json", by_alias=True)
    except Exception as error:
        # What a serializer of somebody else's says may quote the value, and our message is for everybody.
        raise TypeError(f"{type(value).__qualname__} cannot be written as JSON") from error


_encoder: Final = msgspec.json.Encoder(enc_hook=_encode_model)


def _has_non_finite(value: object) -> bool:
    plain = msgspec.to_builtins(value, builtin_types=(float,), enc_hook=_encode_model)
    stack = [plain]
    while stack:
        match stack.pop():
            case float() as number if not math.isfinite(number):
                return True
            case dict() as mapping:
                stack.extend(mapping.values())
            case list() | tuple() as items:
                stack.extend(items)
            case _:
                pass
    return False


def error_info(error: BaseException) -> ErrorInfo:
    """Say of an exception what readers may know: status always, message and details only if it was marked public.

    Public are `PublicError`, Genkit's `PublicError` and `UserFacingError` (known by name and attributes, because Genkit need not be
    installed), and the public errors of this package. Of all others readers see the status (INTERNAL without one) in words.
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
    status = STATUSES.get(str(getattr(error, "status", None)), "INTERNAL")
    if not _is_public(error):
        return hidden_error(status, "")
    message = _storable(str(getattr(error, "original_message", None) or error))
    details: Any = getattr(error, "details", None)
    if isinstance(details, dict) and not isinstance(error, StreamkeepError):
        details = {
            key: value for key, value in details.items() if key != "stack"
        }  # Genkit adds it, and it is for nobody outside
    return ErrorInfo(status, message[:MAX_ERROR_TEXT], _json_or_none(details))


def hidden_error(status: Status, internal: str) -> ErrorInfo:
    """Give an error of which readers see the status only, in words."""
    return ErrorInfo(status, status.lower().replace("_", " "), None, internal)


def _is_public(error: BaseException) -> bool:
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
