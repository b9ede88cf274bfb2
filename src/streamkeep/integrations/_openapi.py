"""What `durable_flow` says of itself in an app's OpenAPI description; it decides nothing about requests."""

from collections.abc import Mapping
from typing import Any, Final

from genkit.plugin_api import Action

from ..errors import STATUSES
from ..events import MAX_OFFSET

_ERROR: Final = {
    "type": "object",
    "properties": {"status": {"enum": list(STATUSES)}, "message": {"type": "string"}, "details": {}},
    "required": ["status", "message", "details"],
}
_STREAM_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9_~][A-Za-z0-9_~.:@=+-]{0,254}$"}
_OFFSET: Final = {"type": "integer", "minimum": -1, "maximum": MAX_OFFSET}


def running(flow: Action[Any, Any, Any, Any]) -> dict[str, Any]:
    """Describe the POST that starts or resumes a flow."""
    once = _object_of({"result": flow.output_schema})
    return {
        "parameters": [
            _header("X-Genkit-Stream-Id", _STREAM_ID, "Resume this stream; the body is not read then."),
            _header("X-Genkit-Stream-Offset", _OFFSET, "Resume after the event of this offset."),
            # (OpenAPI ignores parameters of the name Accept.)
            {"name": "stream", "in": "query", "schema": {"enum": ["true"]}, "description": "As `Accept: text/event-stream`."},
        ],
        "requestBody": {"content": {"application/json": {"schema": _input_schema(flow)}}},
        "responses": {
            "200": {
                "description": "The output, or the stream.",
                "headers": {
                    "X-Genkit-Stream-Id": {
                        "schema": _STREAM_ID,
                        "description": "Of an answer that streams, or goes on as a stream.",
                    },
                    "X-Genkit-Trace-Id": {"schema": {"type": "string"}, "description": "Of one that does not stream."},
                    "X-Genkit-Span-Id": {"schema": {"type": "string"}, "description": "Beside it."},
                },
                "content": {"application/json": {"schema": once}, "text/event-stream": {"itemSchema": _frame(flow)}},
            },
            "204": {"description": "There is no such stream to resume."},
            "408": _failure("The body took too long to arrive."),
            "413": _failure("The body is too large."),
            "429": _failure("Too many streams are being produced."),
            "default": _failure("Any other error; its code is its status's."),
        },
    }


def stopping() -> dict[str, Any]:
    """Describe the DELETE that stops a flow."""
    return {
        "parameters": [{**_header("X-Genkit-Stream-Id", _STREAM_ID, "The stream to stop."), "required": True}],
        "responses": {
            "200": {
                "description": "Whether it was stopped; else it had ended.",
                "content": {"application/json": {"schema": _object_of({"stopped": {"type": "boolean"}})}},
            },
            "404": _failure("There is no such stream."),
            "default": _failure("Any other error; its code is its status's."),
        },
    }


def calling() -> dict[str, Any]:
    """Describe what an agent is asked beside its turns."""
    lookup = {"type": "object", "properties": {"snapshotId": {"type": "string"}, "sessionId": {"type": "string"}}}
    return {
        "requestBody": {
            "content": {"application/json": {"schema": _object_of({"data": {"anyOf": [{"type": "string"}, lookup]}})}}
        },
        "responses": {
            "200": {"description": "What is known.", "content": {"application/json": {"schema": _object_of({"result": {}})}}},
            "404": _failure("There is no such snapshot."),
            "default": _failure("Any other error; its code is its status's."),
        },
    }


def _input_schema(flow: Action[Any, Any, Any, Any]) -> dict[str, Any]:
    init: Any = flow.metadata.get("initSchema")
    schema = _object_of({"data": flow.input_schema} | ({} if init is None else {"init": init}))
    # That null will not do is certain only where the schema names one type.
    required = ["data"] if schema["properties"]["data"].get("type", "null") != "null" else []
    return {**schema, "required": required, "additionalProperties": False}


def _frame(flow: Action[Any, Any, Any, Any]) -> dict[str, Any]:
    contents = [_object_of({"message": {}}), _object_of({"result": flow.output_schema}), _object_of({"error": _ERROR})]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"oneOf": contents}}
    return _object_of({"data": data})


def _object_of(properties: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    schemas = {name: _inlined(schema, schema.get("$defs", {})) for name, schema in properties.items()}
    return {"type": "object", "properties": schemas, "required": list(properties)}


def _inlined(schema: Any, definitions: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    """Give a schema without `$defs`, whose references would mean something else in the app's document."""
    match schema:
        case {"$ref": str(reference), **siblings}:
            name = reference.removeprefix("#/$defs/")
            # What contains itself is not taken apart a second time: anything goes there.
            meant = {} if name in within else _inlined(definitions[name], definitions, (*within, name))
            return meant | _inlined(siblings, definitions, within)
        case dict():
            return {key: _inlined(value, definitions, within) for key, value in schema.items() if key != "$defs"}
        case list():
            return [_inlined(item, definitions, within) for item in schema]
        case _:
            return schema


def _header(name: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _object_of({"error": _ERROR})}}}
