"""How chunks and outputs are encoded: JSONEncoding, hooks of users' own, and what is refused."""

import collections
import dataclasses
import datetime as dt
import enum
import json
import math
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import anyio.to_thread
import attrs
import httpx_sse
import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from fastapi.sse import ServerSentEvent
from hypothesis import given
from hypothesis import strategies as st
from tests.core.helpers import replay

from streamkeep import InMemoryStreamManager, InvalidArgumentError, JSONEncoding, StreamManager
from streamkeep._depth import MAX_DEPTH
from streamkeep._encoding import checked
from streamkeep._pydantic import private_fields
from streamkeep.events import chunk_record, done_record, encode_json

LENIENT: Final = JSONEncoding(non_finite="null", surrogates="replace")
SPARSE: Final = JSONEncoding(exclude_none=True)


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "a lie"

    __repr__ = __str__


class Whole(int):
    def __str__(self) -> str:
        return "a lie"

    __repr__ = __int__ = __index__ = __str__  # type: ignore[assignment]  # as somebody may


class Real(float):
    def __repr__(self) -> str:
        return "a lie"

    __str__ = __float__ = __repr__  # type: ignore[assignment]  # as somebody may


class Row(list[Any]):
    pass


class Table(dict[Any, Any]):
    pass


class Pair(NamedTuple):
    left: object
    right: object


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Odd(enum.Enum):
    NAN = math.nan
    TEXT = "text"


@dataclasses.dataclass
class State:
    message_history: list[str]
    _system_prompt: str = "secret"


@dataclasses.dataclass(slots=True)
class RunResult:
    output: object
    _state: object = dataclasses.field(default_factory=lambda: State(["secret"]), repr=False)
    _client: object = dataclasses.field(default_factory=object, repr=False)


@dataclasses.dataclass
class RunResultEvent:
    """As pydantic-ai's last event."""

    result: RunResult
    event_kind: str = "agent_run_result"


class Delta(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    text: str = ""
    finish: str | None = None
    extra: Any = None


class Measure(pydantic.BaseModel):
    x: float


class Struct(msgspec.Struct, tag="struct"):
    text: object = None
    _id: int | None = None


class Row3(msgspec.Struct, array_like=True):
    left: object
    right: object = None


@dataclasses.dataclass
class Holder:
    held: object
    missing: object = dataclasses.field(init=False)


@attrs.define
class Attrs:
    held: object
    _private: object = "secret"


def decoded(value: object, encode: Callable[[object], bytes] = encode_json) -> object:
    data: object = msgspec.json.decode(encode(value))
    return data


@pytest.fixture(autouse=True)
def without_pydantics_dataclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no dataclasses of pydantic's: where there may be some, each value is looked at."""
    monkeypatch.delitem(sys.modules, "pydantic.dataclasses")


# Private fields


@pytest.mark.parametrize(
    "place", [lambda event: event, lambda event: {"a": [event, None]}, Holder, Struct, Attrs, Row3], ids=range(6)
)
def test_private_fields_of_dataclasses_never_go_out(place: Callable[[object], object]) -> None:
    sent = encode_json(place(RunResultEvent(RunResult({"_key": "the user's own"}))))

    assert b"secret" not in sent
    assert b'"result":{"output":{"_key":"the user\'s own"}},"event_kind":"agent_run_result"' in sent


def test_private_fields_of_dataclasses_that_could_be_encoded_do_not_go_out() -> None:
    assert decoded([State(["hi"]), "_"]) == [{"message_history": ["hi"]}, "_"]


def test_private_fields_of_dataclasses_in_models_do_not_go_out() -> None:
    class Computed(Delta):
        model_config = pydantic.ConfigDict(extra="allow")

        @pydantic.computed_field
        def state(self) -> State:
            return State([])

    state = State(["hi"])
    computed = Computed.model_validate({"extra": [{"a": (state, Delta(extra=state))}], "more": state})
    sent = decoded({"a": computed})

    shown = {"message_history": ["hi"]}
    assert sent == {
        "a": {
            "text": "",
            "finish": None,
            "extra": [{"a": [shown, {"text": "", "finish": None, "extra": shown}]}],
            "more": shown,
            "state": {"message_history": []},
        }
    }
    assert decoded(pydantic.RootModel[list[State]]([state])) == [shown]


def test_a_model_that_cannot_leave_private_fields_out_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Key:
        name: str = "a"
        _secret: str = "secret"

    with pytest.raises(InvalidArgumentError, match="private fields"):
        encode_json(Delta(extra={Key()}))
    assert decoded(Delta(extra={"_a"})) == {"text": "", "finish": None, "extra": ["_a"]}


def test_a_models_own_names_may_begin_with_an_underscore() -> None:
    class Document(pydantic.BaseModel):
        id: str = pydantic.Field(serialization_alias="_id")
        note: str | None = None

    assert decoded([Document(id="1"), Struct(_id=2)]) == [
        {"_id": "1", "note": None},
        {"type": "struct", "text": None, "_id": 2},
    ]


def test_pydantics_dataclasses_are_written_as_pydantic_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic.dataclasses", pydantic.dataclasses)

    @pydantic.dataclasses.dataclass
    class Account:
        name: str = pydantic.Field(default="a", serialization_alias="Name")
        password: pydantic.SecretStr = pydantic.SecretStr("secret")
        hidden: str = pydantic.Field(default="secret", exclude=True)
        _private: str = "secret"

    @dataclasses.dataclass
    class Derived(Account):
        more: int = 1

    shown = {"Name": "a", "password": "**********"}
    assert decoded(Account()) == shown
    assert decoded({"a": [Account(), 1.5]}) == {"a": [shown, 1.5]}
    derived = Derived(
        "b", pydantic.SecretStr("secret"), "secret", more=2
    )  # a plain dataclass, of which pydantic makes the same
    assert decoded([derived]) == [{"Name": "b", "password": "**********", "more": 2}]
    with pytest.raises(InvalidArgumentError, match="Derived cannot be written"):  # its defaults are pydantic's fields
        encode_json(Derived())


def test_a_dataclass_whose_serializer_is_given_by_a_descriptor_is_written_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic.dataclasses", pydantic.dataclasses)

    class OwnSerializer:
        def __get__(self, _: object, owner: type) -> Any:
            return pydantic.TypeAdapter(owner).serializer

    class Counted:
        __pydantic_serializer__ = OwnSerializer()

        @pydantic.model_serializer(mode="wrap")
        def serialize(self, handler: Any) -> Any:
            return {**handler(self), "count": 1}

    @dataclasses.dataclass
    class Part(Counted):
        """As pydantic-ai's tool returns."""

        content: object
        _private: str = "secret"

    @dataclasses.dataclass
    class Event:
        part: Part

    assert decoded(Event(Part("x"))) == {"part": {"content": "x", "count": 1}}


def test_a_number_that_is_none_is_written_as_the_models_own_json_has_it() -> None:
    @pydantic.dataclasses.dataclass(config={"ser_json_inf_nan": "strings"})
    class Point:
        y: float

    class Texts(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(ser_json_inf_nan="strings")
        x: float
        more: Any = None

    class Constants(Texts):
        model_config = pydantic.ConfigDict(ser_json_inf_nan="constants")

    value = Texts(x=math.nan, more=[{"a": (Point(-math.inf), None, 1.5, State([]))}])
    written = {"x": "NaN", "more": [{"a": [{"y": "-Infinity"}, None, 1.5, {"message_history": []}]}]}
    assert decoded(value) == decoded({"a": value}, LENIENT)["a"] == written  # type: ignore[index]  # an object
    assert decoded(Texts(x=math.nan), LENIENT) == {"x": "NaN", "more": None}
    for other in (Measure(x=math.nan), Constants(x=math.nan)):
        with pytest.raises(InvalidArgumentError, match="NaN"):
            encode_json(other)
    assert decoded(Texts(x=math.nan, more="\ud800"), LENIENT) == {"x": None, "more": "\ufffd"}  # it has no JSON of its own


# Fields that are None, or not set


def test_fields_that_are_none_are_left_out_and_the_users_own_nulls_stay() -> None:
    value = [
        {"a": None},
        Holder(None),
        Struct(None),
        Struct("x"),
        Row3(None),
        Attrs(None),
        Delta(extra={"a": None}),
        Holder(Delta(extra=Delta())),
    ]

    assert decoded(value, SPARSE) == [
        {"a": None},
        {},
        {"type": "struct"},
        {"type": "struct", "text": "x"},
        [None, None],
        {},
        {"text": "", "extra": {"a": None}},
        {"held": {"text": "", "extra": {"text": ""}}},
    ]


def test_fields_that_were_not_given_are_left_out() -> None:
    unset = JSONEncoding(exclude_unset=True)

    assert decoded({"a": Delta(finish=None), "b": Holder(Delta(text="x"))}, unset) == {
        "a": {"finish": None},
        "b": {"held": {"text": "x"}},
    }


def test_what_a_model_gives_only_once_is_not_lost() -> None:
    class Once(pydantic.BaseModel):
        items: Iterable[int]
        none: None = None

    assert decoded({"a": Once(items=iter([1, 2])), "b": None}) == {"a": {"items": [1, 2], "none": None}, "b": None}


# As the standard library does it


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
scalars = (
    plain
    | st.text().map(Text)
    | st.integers(-(2**63), 2**63).map(Whole)
    | st.floats(allow_nan=False, allow_infinity=False).map(Real)
    | st.sampled_from([Colour.RED, Level.HIGH])
)
keys = (
    st.text() | st.text().map(Text) | st.integers() | st.integers().map(Whole) | st.booleans() | st.none() | st.just(Colour.RED)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(Row)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, inner).map(Table)
        | st.dictionaries(keys, inner).map(collections.OrderedDict)
    ),
    max_leaves=10,
)


def through_the_standard_library(value: object) -> object:
    """Give what json.dumps makes of a value; its C encoder asks lists, not their iterators."""
    data: object = json.loads(json.dumps(value))
    return data


@given(values)
def test_subclasses_are_taken_as_the_standard_library_takes_them(value: object) -> None:
    assert decoded(value) == decoded(value, LENIENT) == through_the_standard_library(value)


@given(values)
def test_whatever_way_a_value_takes_its_json_is_the_same(value: object) -> None:
    assert decoded([value, Attrs(None)]) == [decoded(value), {"held": None}]


@pytest.mark.parametrize(
    "value", [types.MappingProxyType({}), collections.UserDict(), collections.ChainMap(), range(3), iter("a"), {}.keys()]
)
def test_what_only_looks_like_a_dict_or_a_list_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match="no JSON form"):
        encode_json({"a": value})


def test_what_msgspec_knows_may_be_beside_what_it_does_not() -> None:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    value = {now: [now, b"a", {1}, frozenset([2]), Odd.TEXT, Text("x")], None: 1, 1.5: 2, Real(2.5): 3}

    assert decoded(value) == {
        "2026-01-01T00:00:00Z": ["2026-01-01T00:00:00Z", "YQ==", [1], [2], "text", "x"],
        "null": 1,
        "1.5": 2,
        "2.5": 3,
    }


# What is no number, and what is no text


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: [x],
        Real,
        Holder,
        lambda x: {"a": Struct(x)},
        lambda _: Odd.NAN,
        lambda x: Measure(x=x),
    ],
    ids=range(7),
)
def test_nan_is_refused_or_null(make: Callable[[float], object]) -> None:
    with pytest.raises(InvalidArgumentError, match="NaN"):
        encode_json(make(math.nan))
    assert b"null" in LENIENT(make(math.nan))


@pytest.mark.parametrize(
    "make",
    [lambda x: x, lambda x: {x: 1}, lambda x: {Text(x): 1}, Text, Holder, Struct, lambda x: Delta.model_construct(text=x)],
    ids=range(7),
)
def test_lone_surrogates_are_refused_or_replaced(make: Callable[[str], object]) -> None:
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        encode_json(make("a\ud800b"))
    assert "a\ufffdb" in LENIENT(make("a\ud800b")).decode()
    assert "😀" in LENIENT(make("\ud83d\ude00")).decode()  # two halves are one character


def test_a_policy_that_does_not_exist_is_refused() -> None:
    for options in ({"non_finite": "drop"}, {"surrogates": "drop"}):
        with pytest.raises(InvalidArgumentError, match="non_finite is"):
            JSONEncoding(**options)  # type: ignore[arg-type]  # on purpose


def test_encodings_are_values() -> None:
    assert JSONEncoding(exclude_none=True) == SPARSE != JSONEncoding()
    assert repr(SPARSE).startswith("JSONEncoding(exclude_none=True")


# What nothing else takes


def test_default_is_asked_once_for_what_nothing_else_takes() -> None:
    asked: list[object] = []

    def default(value: Any) -> object:
        asked.append(value)
        return list(value)

    numbers = (number for number in (1, Text("x")))
    assert decoded({"a": numbers, "b": None}, JSONEncoding(default=default)) == {"a": [1, "x"], "b": None}
    assert asked == [numbers]


def test_default_may_not_raise_nor_go_round_for_ever() -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read") as raised:
        JSONEncoding(default=lambda value: 1 / 0)(object())
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(InvalidArgumentError, match="256 levels"):
        JSONEncoding(default=lambda _: object())(object())
    with pytest.raises(InvalidArgumentError, match="256 levels"):
        JSONEncoding(default=lambda value: [value])(object())


def test_a_serializer_that_raises_says_nothing_to_readers() -> None:
    class Broken(Delta):
        @pydantic.field_serializer("text")
        def serialize(self, text: str) -> str:
            raise ValueError(text)

    with pytest.raises(InvalidArgumentError, match="Broken cannot be written as JSON") as raised:
        encode_json([Delta(), Broken(text="secret")])
    assert "secret" not in str(raised.value)
    assert decoded(Delta(text="next")) == {"text": "next", "finish": None, "extra": None}


def test_what_a_serializer_gives_is_bounded() -> None:
    class Circular:
        def model_dump(self, **_: object) -> object:
            return [self]

    class Deep(Circular):
        def model_dump(self, **_: object) -> object:
            items: list[object] = []
            items.append(items)
            return items

    deepest: object = 1
    for _ in range(300):
        deepest = [deepest]
    for value in (Circular(), Deep()):
        with pytest.raises(InvalidArgumentError, match="256 levels"):
            encode_json(value)
    with pytest.raises(InvalidArgumentError, match="256 levels"):
        private_fields(deepest)
    with pytest.raises(InvalidArgumentError, match="256 levels"):
        encode_json({"a": msgspec.Raw(b"[" * 100_000 + b"]" * 100_000)})


def test_private_fields_of_what_members_of_enums_in_models_stand_for_do_not_go_out() -> None:
    class Place(enum.Enum):
        HERE = State([])

    assert "_" not in encode_json(Delta(extra=[Place.HERE])).decode().replace("message_history", "")


def test_a_model_whose_iterators_may_hold_private_fields_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="iterator"):
        encode_json(Delta(extra=iter([State([])])))
    assert decoded(Delta(extra=iter([1]))) == {"text": "", "finish": None, "extra": [1]}


def test_json_that_a_hook_gives_as_ready_is_looked_at() -> None:
    assert JSONEncoding(default=lambda _: msgspec.Raw(b"[1]"))({"a": object()}) == b'{"a":[1]}'
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        JSONEncoding(default=lambda _: msgspec.Raw(b'1,"b":2'))({"a": object()})


def test_what_a_model_was_is_forgotten_when_its_encoding_is_broken_off() -> None:
    class Broken(pydantic.BaseModel):
        def model_dump(self, **_: object) -> Any:
            raise KeyboardInterrupt

    delta = Delta(text="old")
    with pytest.raises(KeyboardInterrupt):
        encode_json([delta, Broken()])
    delta.text, delta.extra = "new", float("nan")

    assert decoded(delta) == {"text": "new", "finish": None, "extra": None}


def test_a_serializer_that_writes_private_fields_is_refused() -> None:
    class Shown(pydantic.BaseModel):
        state: State

        @pydantic.field_serializer("state")
        def serialize(self, state: State) -> Any:
            return state

    with pytest.raises(InvalidArgumentError, match="writes private fields"):
        encode_json(Shown(state=State([])))


# Hooks of one's own


async def test_a_manager_or_one_stream_may_encode_in_its_own_way() -> None:
    async with InMemoryStreamManager(encode=lambda value: json.dumps([value]).encode() + b"\n") as streams:
        async with streams.open("own") as stream:
            await stream.write(1)
            await anyio.to_thread.run_sync(stream.write_soon, 2)
            await stream.done(3)
        async with streams.open("another", encode=SPARSE) as stream:
            await stream.write(Holder(None))
        async with streams.open("another", resume=True) as stream:
            await stream.write(4)

        assert await replay(streams, "own") == [[1], [2], ("done", [3])]
        assert await replay(streams, "another") == [{}, [4]]


async def test_a_connected_manager_may_encode_in_its_own_way() -> None:
    async with StreamManager.connect("memory://", encode=lambda _: b"1") as streams, streams.open("s") as stream:
        await stream.write(object())
        with pytest.raises(InvalidArgumentError):
            encode_json(object())
        assert await replay(streams, "s") == [1]


@pytest.mark.parametrize(
    "given_",
    [
        b"",
        b"NaN",
        b"{",
        b"1 2",
        b"\xff",
        b'"\xff"',
        b'"\\ud800"',
        b"\xef\xbb\xbf1",
        b"1e999",
        b"[" * 300 + b"]" * 300,
        b"[" * 10**5,
    ],
)
def test_what_a_hook_gives_has_to_be_json(given_: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        checked(lambda _: given_)(1)
    with pytest.raises(InvalidArgumentError):
        encode_json(msgspec.Raw(given_))


def test_a_hook_has_to_give_bytes_and_what_it_raises_is_one_error() -> None:
    with pytest.raises(InvalidArgumentError, match="gave str"):
        checked(json.dumps)(1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidArgumentError, match="cannot encode object") as raised:
        checked(lambda value: json.dumps(value).encode())(object())
    assert isinstance(raised.value.__cause__, TypeError)
    with pytest.raises(InvalidArgumentError, match="NaN"):
        checked(lambda value: encode_json([value]))(math.nan)

    def interrupted(_: object) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(interrupted)(1)


# Server-sent events


@pytest.mark.parametrize(
    "text",
    [
        "data: x\n\n",
        "event: delta\r\ndata: {}\r\n\r\n",
        ": ping\n\nid: 1\ndata:x\n\ndata: y\n\n",
        "\ufeffdata: x\r\r",
        "retry: 3000\n\n",
        "\n\ndata: x\n\n",
    ],
)
def test_server_sent_events_are_refused_as_chunks(text: str) -> None:
    for chunk in (text, Text(text), text.encode(), bytearray(text.encode()), memoryview(text.encode())):
        if text.startswith("\ufeff") and not isinstance(chunk, str):
            continue
        with pytest.raises(InvalidArgumentError, match="Give the object itself"):
            chunk_record(chunk)
    with pytest.raises(InvalidArgumentError, match="Give the object itself"):
        chunk_record(text, checked(lambda value: json.dumps(value).encode()))
    assert done_record(text)
    assert chunk_record({"text": text})
    assert chunk_record(msgspec.Raw(json.dumps(text).encode()))


@pytest.mark.parametrize(
    "text",
    [
        "data: x",
        "data: x\n",
        ":\n\n",
        "data:\n\n",
        "end\n\n",
        "as in\ndata: x\n\n",
        "data: x\n\nmore\n\n",
        "\n\n",
        "",
        "Data: x\n\n",
        "n",
    ],
)
def test_what_only_looks_like_server_sent_events_is_a_chunk(text: str) -> None:
    for chunk in (text, Text(text), text.encode()):
        assert chunk_record(chunk)


def test_a_hook_may_take_server_sent_events_apart() -> None:
    def encode(value: object) -> bytes:
        assert isinstance(value, bytes)
        return json.dumps(value.decode()[6:-2]).encode()

    assert chunk_record(b"data: x\n\n", checked(encode)) == b'c"x"'


@pytest.mark.parametrize("event", [ServerSentEvent(data=1), httpx_sse.ServerSentEvent(data="x")])
def test_objects_that_are_server_sent_events_are_refused_in_words(event: object) -> None:
    for value in (event, [event, None]):
        with pytest.raises(InvalidArgumentError, match="ServerSentEvent is a server-sent event already"):
            encode_json(value)


class Unknown:
    """What pydantic knows nothing of."""


def test_a_dataclass_that_pydantic_has_no_serializer_for_is_refused() -> None:
    @pydantic.dataclasses.dataclass
    class Base:
        a: int

    @dataclasses.dataclass
    class Derived(Base):
        b: Unknown

    with pytest.raises(InvalidArgumentError, match="no serializer for"):
        encode_json(object.__new__(Derived))


def test_numbers_that_are_none_are_written_as_a_dataclasss_own_json_has_them() -> None:
    @pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(ser_json_inf_nan="strings"))
    class Measure:
        x: float

    assert encode_json(Measure(float("inf"))) == b'{"x":"Infinity"}'


def test_numbers_that_are_none_are_refused_where_nothing_says_how_they_are_written() -> None:
    class Dumped:
        def model_dump(self, **_options: object) -> dict[str, float]:
            return {"x": float("nan")}

    with pytest.raises(InvalidArgumentError):
        encode_json(Dumped())


def test_numbers_that_are_none_are_not_looked_for_deeper_than_json_may_be() -> None:
    depth = MAX_DEPTH + 2

    class Dumped:
        def model_dump(self, **_options: object) -> object:
            value: object = float("nan")
            for _ in range(depth):
                value = [value]
            return value

        def model_dump_json(self, **_options: object) -> str:
            return "[" * depth + '"NaN"' + "]" * depth

    with pytest.raises(InvalidArgumentError):
        encode_json(Dumped())
