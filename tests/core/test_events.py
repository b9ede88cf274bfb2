import dataclasses
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pydantic
import pytest

from streamkeep import (
    ErrorInfo,
    InvalidArgumentError,
    PublicError,
    StorageCorruptError,
    StorageError,
    StreamEvent,
    StreamEventType,
    StreamNotFoundError,
)
from streamkeep._depth import MAX_DEPTH
from streamkeep.events import (
    MAX_ERROR_TEXT,
    chunk_record,
    decoder_of,
    done_record,
    encode_json,
    error_info,
    error_record,
    event_of,
    is_error,
    is_terminal,
)


@dataclasses.dataclass
class Token:
    text: str


class TokenStruct(msgspec.Struct):
    text: str


class TokenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    text: str = pydantic.Field(alias="Text")


class Measure(pydantic.BaseModel):
    x: float | None


def nested(depth: int, leaf: object) -> object:
    value = leaf
    for _ in range(depth):
        value = [value]
    return value


def circle() -> object:
    items: list[object] = []
    items.append(items)
    return items


@pytest.mark.parametrize("value", [None, 0, False, "", "null", [], {"a": [1, 2.5, None]}, "\u2028é\0", 2**53, -(2**63)])
@pytest.mark.promise("P2")
def test_a_chunk_comes_back_equal(value: object) -> None:
    assert event_of(chunk_record(value), 7).chunk == value


@pytest.mark.parametrize("value", [Token("hi"), TokenStruct("hi"), TokenModel(Text="hi")])
def test_typed_values_go_in_and_come_back(value: Any) -> None:
    event = event_of(chunk_record(value), 0, decoder_of(type(value)))

    assert event.chunk == value


def test_typed_values_may_be_nested_in_plain_ones() -> None:
    assert encode_json({"a": [TokenModel(Text="hi"), Token("ho")]}) == b'{"a":[{"Text":"hi"},{"text":"ho"}]}'


def test_a_chunk_of_another_shape_is_told_when_it_is_looked_at() -> None:
    event = event_of(chunk_record({"txt": "hi"}), 0, decoder_of(Token))

    with pytest.raises(msgspec.ValidationError):
        event.chunk  # noqa: B018


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(math.nan, id="NaN"),
        pytest.param([1.0, None, -math.inf], id="infinity in a list"),
        pytest.param({"a": (1, {"b": math.nan})}, id="NaN deep inside"),
        pytest.param({math.nan}, id="NaN in a set"),
        pytest.param(Measure(x=math.nan), id="NaN in a model"),
        pytest.param({"a": Token(math.inf)}, id="infinity in a dataclass"),  # type: ignore[arg-type]  # on purpose
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param({"\udfff": 1}, id="lone surrogate as a key"),
        pytest.param(object(), id="odd object"),
        pytest.param({1, object()}, id="set of odd objects"),
        pytest.param({(1, 2): 3}, id="tuple as a key"),
        pytest.param(TokenModel, id="a model's class"),
    ],
)
@pytest.mark.promise("P13")
def test_what_is_not_json_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        encode_json(value)


@pytest.mark.parametrize("value", [[None], (None, 1.5), Measure(x=None), {"a": {"b": None}}, nested(200, None)])
def test_null_is_no_nan(value: object) -> None:
    assert b"null" in encode_json(value)


def nested_objects(depth: int) -> object:
    value: object = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def nested_both(depth: int) -> object:
    value: object = 1
    for number in range(depth):
        value = {"a": value, "b": 0} if number % 2 else [value, 0]
    return value


@pytest.mark.parametrize("make", [lambda depth: nested(depth, 1), nested_objects, nested_both])
@pytest.mark.promise("P13")
def test_json_is_nested_256_levels_deep_and_no_more(make: Callable[[int], object]) -> None:
    assert msgspec.json.decode(encode_json(make(MAX_DEPTH))) == make(MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 1_000, 5_000):
        with pytest.raises(InvalidArgumentError, match="more than 256 levels"):
            encode_json(make(depth))


@pytest.mark.promise("P13")
def test_json_of_any_depth_is_refused_and_not_recursed_into() -> None:
    for value in (nested(100_000, 1), nested(5_000, None), circle(), msgspec.Raw(b"[" * 100_000 + b"]" * 100_000)):
        with pytest.raises(InvalidArgumentError, match="more than 256 levels"):
            encode_json(value)


def test_json_that_is_wide_is_not_deep() -> None:
    value = [{"a": [number]} for number in range(10_000)]

    assert msgspec.json.decode(encode_json(value)) == value
    assert encode_json("[" * 1_000) == b'"' + b"[" * 1_000 + b'"'


def test_an_event_has_only_what_its_type_says() -> None:
    chunk: StreamEvent[int] = event_of(chunk_record(1), 3)
    done: StreamEvent[int] = event_of(done_record({"a": 1}), 4)
    error: StreamEvent[int] = event_of(error_record(ErrorInfo("ABORTED", "gone")), 5)

    assert (chunk.type, chunk.offset, chunk.chunk, chunk.data) == (StreamEventType.CHUNK, 3, 1, b"1")
    assert (done.type, done.offset, done.output) == (StreamEventType.DONE, 4, {"a": 1})
    assert (error.type, error.offset, error.error) == (StreamEventType.ERROR, 5, ErrorInfo("ABORTED", "gone"))
    for event, name in ((chunk, "output"), (chunk, "error"), (done, "chunk"), (error, "output")):
        with pytest.raises(AttributeError, match=f"is of type {event.type}"):
            getattr(event, name)


def test_an_event_shows_what_is_stored() -> None:
    event: StreamEvent[int] = event_of(chunk_record(1), 3)

    assert repr(event) == "StreamEvent(CHUNK, offset=3, data=b'1')"


def test_json_that_is_ready_is_taken_as_it_is() -> None:
    assert encode_json({"a": msgspec.Raw(b'{"b":null}')}) == b'{"a":{"b":null}}'


def test_done_and_error_are_terminal() -> None:
    assert is_terminal(done_record(None))
    assert is_terminal(error_record(ErrorInfo("INTERNAL", "")))
    assert not is_terminal(chunk_record(None))
    assert not is_terminal(b"")
    assert is_error(error_record(ErrorInfo("INTERNAL", "")))
    assert not is_error(done_record(None))


@pytest.mark.parametrize("record", [b"", b"x1"])
def test_a_foreign_record_is_corruption(record: bytes) -> None:
    with pytest.raises(StorageCorruptError):
        event_of(record, 0)


@pytest.mark.promise("P15")
def test_an_exception_is_kept_in_full_and_shown_as_internal() -> None:
    info = error_info(ValueError("postgres://user:secret@db"))

    assert (info.status, info.message, info.details) == ("INTERNAL", "internal", None)
    assert "ValueError: postgres://user:secret@db" in info.internal


@pytest.mark.promise("P15")
def test_a_public_error_is_shown() -> None:
    info = error_info(PublicError("RESOURCE_EXHAUSTED", "try later", {"after": 5}))

    assert (info.status, info.message, info.details) == ("RESOURCE_EXHAUSTED", "try later", {"after": 5})


@pytest.mark.promise("P15")
def test_our_errors_are_shown_unless_they_speak_of_the_storage() -> None:
    assert error_info(StreamNotFoundError("stream not found")).message == "stream not found"
    assert error_info(StorageError("disk /dev/sda1")).message == "unavailable"


class UserFacingError(Exception):
    """As Genkit's, known by name."""

    def __init__(self, message: str, status: object = "NOT_FOUND", details: object = None) -> None:
        super().__init__(f"NOT_FOUND: {message}")
        self.original_message, self.status, self.details = message, status, details


def test_genkits_public_errors_are_known_by_name() -> None:
    assert error_info(UserFacingError("no such flow")).message == "no such flow"


def test_details_that_are_not_json_are_left_out() -> None:
    assert error_info(UserFacingError("odd", details=object())).details is None


@pytest.mark.parametrize("status", [None, "", "BOGUS", 404, {"code": 5}, ["NOT_FOUND"]])
def test_a_status_that_is_none_of_ours_is_internal(status: object) -> None:
    assert error_info(UserFacingError("odd", status)).status == "INTERNAL"


@pytest.mark.promise("P15")
def test_of_a_long_exception_so_much_is_kept_that_it_can_be_stored() -> None:
    info = error_info(PublicError("ABORTED", "x" * 10**6, ["x" * 10**6]))

    assert (len(info.message), len(info.internal), info.details) == (MAX_ERROR_TEXT, MAX_ERROR_TEXT, None)


def test_the_stack_that_genkit_adds_to_a_public_error_is_for_nobody() -> None:
    class PublicError(Exception):  # Genkit's, known by name and attributes
        status = "NOT_FOUND"
        details: object = {"stack": "secret.py, line 1", "model": "m"}

    assert error_info(PublicError("no such model")).details == {"model": "m"}


@pytest.mark.parametrize("error", [ValueError("\ud800"), PublicError("ABORTED", "\ud800", "\ud800")])
@pytest.mark.promise("P15")
def test_whatever_an_exception_says_can_be_stored(error: Exception) -> None:
    assert error_record(error_info(error))


class OddError(Exception):
    """One whose attributes are code, which fails."""

    def __init__(self, odd: str) -> None:
        super().__init__("odd")
        self.odd = odd

    def __getattribute__(self, name: str) -> object:
        if name == super().__getattribute__("odd"):
            raise RuntimeError("no such thing")
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("code", "status"), [(429, "RESOURCE_EXHAUSTED"), (401, "INTERNAL"), (404, "INTERNAL"), (503, "INTERNAL")]
)
def test_of_what_a_provider_of_models_answers_readers_are_told_that_it_is_asked_too_much_and_nothing_else(
    code: int, status: str
) -> None:
    class APIStatusError(Exception):
        status_code = code

    words = {429: "RESOURCE_EXHAUSTED", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 503: "UNAVAILABLE"}
    gemini = type("APIError", (Exception,), {"__module__": "google.genai.errors", "code": code, "status": words[code]})
    for error in (APIStatusError("key sk-1"), gemini("key sk-1")):
        info = error_info(error)
        assert (info.status, info.message) == (status, status.lower().replace("_", " "))
        assert "key sk-1" in info.internal


@pytest.mark.parametrize("odd", ["status", "__notes__"])
@pytest.mark.promise("P15")
def test_an_exception_that_cannot_be_looked_at_is_internal(odd: str) -> None:
    info = error_info(OddError(odd))

    assert (info.status, info.message) == ("INTERNAL", "internal")
    assert "OddError" in info.internal


@pytest.mark.promise("P15")
def test_details_that_are_as_deep_as_may_be_do_not_keep_a_stream_from_ending() -> None:
    allowed, too_deep = nested(MAX_DEPTH - 1, 1), nested(MAX_DEPTH, 1)

    assert error_info(PublicError("ABORTED", "deep", allowed)).details == allowed
    assert error_info(PublicError("ABORTED", "deep", too_deep)).details is None
    assert error_record(error_info(PublicError("ABORTED", "deep", too_deep)))


class Asked(pydantic.BaseModel):
    """What is asked."""

    text: str


@pytest.mark.parametrize(
    ("type_", "data", "value"),
    [
        (Asked, b'{"text":"why"}', Asked(text="why")),
        (list[Asked], b'[{"text":"why"}]', [Asked(text="why")]),
        (Asked | None, b"null", None),
        (list[int], b"[1]", [1]),
    ],
)
def test_models_are_read_and_lists_of_them(type_: Any, data: bytes, value: object) -> None:
    assert decoder_of(type_)(data) == value
