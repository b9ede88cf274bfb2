"""A provider of language models on loopback, which speaks the documented events of OpenAI, Anthropic and Gemini.

What a model answers its name says: `words` (also with how many of them, `words-1000`), `tool` (calls one, and answers when it has its
output), `thinking`, `fails` (in mid-answer), `cut` (ends in mid-answer, as if that were all), `waits` (in mid-answer, until it may end),
`limited` (429).
"""

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.http.servers import serving

Json = dict[str, Any]
Frames = AsyncGenerator[str]

WORDS: Final = ("Nothing", " is", " lost", ", said Alice", ".")
TEXT: Final = "".join(WORDS)
SECRET: Final = "Never say that you are a pirate."
"""Instructions, which no reader of an answer is to see."""
USAGE: Final = (11, 5)
MADE_AT: Final = 1_764_400_000
FAILURE: Final = "The server had an error while processing your request"


class Provider:
    """What answers, and what it has seen.

    Attributes:
        url: where it is.
        asked: the bodies of the requests.
        left: how many clients have gone before their answer was over.
        may_end: lets a model that waits go on.
    """

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Json] = []
        self.left = 0
        self.may_end = anyio.Event()
        self._responses: dict[str, list[Json]] = {}
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._streaming(chat_completion, error_of_openai), methods=["POST"]),
                Route("/v1/responses", self._streaming(self._response, error_of_openai), methods=["POST"]),
                Route("/v1/responses/{id}", self._resumed),
                Route("/v1/messages", self._streaming(message, error_of_anthropic), methods=["POST"]),
                Route("/{version}/models/{call}", self._gemini, methods=["POST"]),
            ]
        )

    async def until_left(self, clients: int = 1) -> None:
        """Wait until so many clients have gone."""
        with anyio.fail_after(10):
            while self.left < clients:  # noqa: ASYNC110 - no event counts
                await anyio.sleep(0.005)

    def environment(self) -> dict[str, str]:
        """Give what has each SDK ask here."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "none",
            "GOOGLE_GEMINI_BASE_URL": self.url,
            "GEMINI_API_KEY": "none",
        }

    async def waits(self) -> None:
        await self.may_end.wait()

    def _streaming(
        self, frames: Callable[["Provider", Json], Frames], error: Callable[[int, str], Json]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            body = json.loads(await request.body())
            self.asked.append(body)
            if body["model"] == "limited":
                return JSONResponse(error(429, "Rate limit reached"), 429, {"retry-after": "0"})
            if not body.get("stream"):
                return JSONResponse(whole_completion(body["model"]))
            return self._sending(frames(self, body))

        return answer

    def _sending(self, frames: Frames) -> Response:
        async def sent() -> AsyncGenerator[str]:
            is_whole = False
            try:
                async for frame in frames:
                    yield frame
                    await checkpoint()  # or one that never waits would not hear that its client has gone
                is_whole = True
            finally:
                if not is_whole:
                    self.left += 1

        return StreamingResponse(sent(), media_type="text/event-stream")

    async def _response(self, _: "Provider", body: Json) -> Frames:
        events: list[Json] = []
        async for event in response_events(self, body):
            events.append({**event, "sequence_number": len(events)})
            if "response" in event:
                self._responses[event["response"]["id"]] = events
            yield named(event["type"], events[-1])

    async def _resumed(self, request: Request) -> Response:
        events = self._responses[request.path_params["id"]]
        after = int(request.query_params.get("starting_after", -1))

        async def frames() -> Frames:
            for event in events:
                if event["sequence_number"] > after:
                    yield named(event["type"], event)

        return self._sending(frames())

    async def _gemini(self, request: Request) -> Response:
        model, _, method = request.path_params["call"].partition(":")
        assert (method, request.query_params["alt"]) == ("streamGenerateContent", "sse")
        body = json.loads(await request.body())
        self.asked.append(body)
        if model == "limited":
            return JSONResponse({"error": {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED"}}, 429)
        return self._sending(generated_content(self, model, body))


@asynccontextmanager
async def running_provider() -> AsyncGenerator[Provider]:
    """Run a provider while entered."""
    provider = Provider()
    async with serving(provider.app) as provider.url:
        yield provider


def named(name: str, event: Json) -> str:
    return f"event: {name}\ndata: {compact(event)}\n\n"


def compact(event: Json) -> str:
    return json.dumps(event, separators=(",", ":"))


def words_of(model: str) -> Iterator[str]:
    count = re.fullmatch(r"words-(\d+)", model)
    return (f" word {number}" for number in range(int(count[1]))) if count else iter(WORDS)


def error_of_openai(status: int, text: str) -> Json:
    kind = "rate_limit_exceeded" if status == 429 else "server_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": kind}}


def error_of_anthropic(status: int, text: str) -> Json:
    kind = "rate_limit_error" if status == 429 else "overloaded_error"
    return {"type": "error", "error": {"type": kind, "message": text}, "request_id": "req_1"}


# OpenAI's chat completions: https://platform.openai.com/docs/api-reference/chat-streaming


async def chat_completion(provider: Provider, body: Json) -> Frames:
    """Give `chat.completion.chunk`s and `[DONE]`."""
    model = body["model"]
    with_usage = (body.get("stream_options") or {}).get("include_usage", False)

    def chunk(choices: list[Json], **more: Any) -> str:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": MADE_AT, "model": model}
        tail = {"service_tier": "default", "system_fingerprint": "fp_1", "obfuscation": "xY3"}
        return f"data: {compact({**head, 'choices': choices, **({'usage': None} if with_usage else {}), **more, **tail})}\n\n"

    def delta(delta: Json, finish_reason: str | None = None) -> str:
        return chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    yield delta({"role": "assistant", "content": "", "refusal": None})
    if model == "tool" and all(message["role"] != "tool" for message in body["messages"]):
        function = {"name": "weather", "arguments": ""}
        yield delta({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})
        for arguments in ('{"city":', '"Paris"}'):
            yield delta({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]})
        yield delta({}, "tool_calls")
    else:
        for number, word in enumerate(words_of(model)):
            if number == 2 and model == "fails":
                yield f"data: {compact(error_of_openai(500, FAILURE))}\n\n"
                return
            if number == 2 and model == "cut":
                return
            if number == 2 and model == "waits":
                await provider.waits()
            if model == "thinking" and number < 2:
                yield delta({"reasoning_content": word})
            else:
                yield delta({"content": word})
        yield delta({}, "stop")
    if with_usage:
        asked, said = USAGE
        yield chunk([], usage={"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said})
    yield "data: [DONE]\n\n"


def whole_completion(model: str) -> Json:
    """Give the `chat.completion` that is asked for without `stream`."""
    said: Json = {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []}
    usage = {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": MADE_AT, "model": model}
    return {**head, "choices": [choice], "usage": usage, "service_tier": "default", "system_fingerprint": "fp_1"}


# OpenAI's Responses: https://platform.openai.com/docs/api-reference/responses-streaming


async def response_events(provider: Provider, body: Json) -> AsyncGenerator[Json]:
    """Give the events of a Response, without their numbers."""
    model, asked = body["model"], body["input"]
    response: Json = {
        "id": f"resp_{len(provider.asked)}",
        "object": "response",
        "created_at": MADE_AT,
        "status": "in_progress",
        "background": bool(body.get("background")),
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": None,
        "metadata": body.get("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "user": None,
    }
    yield {"type": "response.created", "response": response}
    yield {"type": "response.in_progress", "response": response}
    output: list[Json] = []
    has_output = not isinstance(asked, str) and any(item.get("type") == "function_call_output" for item in asked)
    if model == "tool" and not has_output:
        async for event in call_events(output):
            yield event
    else:
        if model == "thinking":
            for event in reasoning_events(output):
                yield event
        async for event in text_events(provider, model, output):
            yield event
            if event["type"] == "error":
                return
        if model == "cut":
            return
    usage = {
        "input_tokens": USAGE[0],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": USAGE[1],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sum(USAGE),
    }
    yield {"type": "response.completed", "response": {**response, "status": "completed", "output": output, "usage": usage}}


async def call_events(output: list[Json]) -> AsyncGenerator[Json]:
    call = {
        "id": "fc_1",
        "type": "function_call",
        "status": "in_progress",
        "call_id": "call_1",
        "name": "weather",
        "arguments": "",
    }
    yield {"type": "response.output_item.added", "output_index": 0, "item": call}
    for delta in ('{"city":', '"Paris"}'):
        yield {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 0, "delta": delta}
    call = {**call, "status": "completed", "arguments": '{"city":"Paris"}'}
    yield {
        "type": "response.function_call_arguments.done",
        "item_id": "fc_1",
        "output_index": 0,
        "name": "weather",
        "arguments": call["arguments"],
    }
    yield {"type": "response.output_item.done", "output_index": 0, "item": call}
    output.append(call)


def reasoning_events(output: list[Json]) -> Iterator[Json]:
    place = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}
    item: Json = {"id": "rs_1", "type": "reasoning", "summary": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": item}
    yield {"type": "response.reasoning_summary_part.added", **place, "part": {"type": "summary_text", "text": ""}}
    yield {"type": "response.reasoning_summary_text.delta", **place, "delta": "Hm.", "obfuscation": "a"}
    yield {"type": "response.reasoning_summary_text.done", **place, "text": "Hm."}
    part = {"type": "summary_text", "text": "Hm."}
    yield {"type": "response.reasoning_summary_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": {**item, "summary": [part]}}
    output.append({**item, "summary": [part]})


async def text_events(provider: Provider, model: str, output: list[Json]) -> AsyncGenerator[Json]:
    at = len(output)
    item: Json = {"id": "msg_1", "type": "message", "status": "in_progress", "content": [], "role": "assistant"}
    place = {"item_id": "msg_1", "output_index": at, "content_index": 0}
    part: Json = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    yield {"type": "response.output_item.added", "output_index": at, "item": item}
    yield {"type": "response.content_part.added", **place, "part": part}
    text = ""
    for number, word in enumerate(words_of(model)):
        if number == 2 and model == "fails":
            yield {"type": "error", "code": "server_error", "message": FAILURE, "param": None}
            return
        if number == 2 and model == "cut":
            return
        if number == 2 and model == "waits":
            await provider.waits()
        text += word
        yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": [], "obfuscation": "8Xk"}
    yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
    part = {**part, "text": text}
    yield {"type": "response.content_part.done", **place, "part": part}
    item = {**item, "status": "completed", "content": [part]}
    yield {"type": "response.output_item.done", "output_index": at, "item": item}
    output.append(item)


# Anthropic's messages: https://docs.anthropic.com/en/docs/build-with-claude/streaming


async def message(provider: Provider, body: Json) -> Frames:
    """Give `message_start` to `message_stop`, or an `error`."""
    async for event in message_events(provider, body):
        yield named(event["type"], event)


async def message_events(provider: Provider, body: Json) -> AsyncGenerator[Json]:
    model = body["model"]
    usage = {"input_tokens": USAGE[0], "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": []}
    yield {"type": "message_start", "message": {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}}
    index = 0
    if model == "thinking":
        yield {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        }
        for word in ("Hm", "."):
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": word}}
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "c2ln"}}
        yield {"type": "content_block_stop", "index": 0}
        index = 1
    is_call = model == "tool" and not any(
        part["type"] == "tool_result"
        for said in body["messages"]
        if not isinstance(said["content"], str)
        for part in said["content"]
    )
    block: Json = (
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}} if is_call else {"type": "text", "text": ""}
    )
    yield {"type": "content_block_start", "index": index, "content_block": block}
    yield {"type": "ping"}
    parts = ('{"city":', '"Paris"}') if is_call else words_of(model)
    for number, part in enumerate(parts):
        if number == 2 and model == "fails":
            yield error_of_anthropic(529, FAILURE)
            return
        if number == 2 and model == "cut":
            return
        if number == 2 and model == "waits":
            await provider.waits()
        delta = {"type": "input_json_delta", "partial_json": part} if is_call else {"type": "text_delta", "text": part}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}
    reason = "tool_use" if is_call else "end_turn"
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None},
        "usage": {"output_tokens": USAGE[1]},
    }
    yield {"type": "message_stop"}


# Gemini's `streamGenerateContent`: https://ai.google.dev/api/generate-content


async def generated_content(provider: Provider, model: str, body: Json) -> Frames:
    """Give `GenerateContentResponse`s."""
    usage = {"promptTokenCount": USAGE[0], "candidatesTokenCount": USAGE[1], "totalTokenCount": sum(USAGE)}

    def content(*parts: Json, **more: Any) -> str:
        candidate = {"content": {"parts": list(parts), "role": "model"}, **more, "index": 0}
        data = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model, "responseId": "r1"}
        return f"data: {compact(data)}\r\n\r\n"

    if model == "tool" and not any("functionResponse" in part for said in body["contents"] for part in said["parts"]):
        yield content({"functionCall": {"name": "weather", "args": {"city": "Paris"}}}, finishReason="STOP")
        return
    for number, word in enumerate(words_of(model)):
        if number == 2 and model == "fails":
            yield f"data: {compact({'error': {'code': 503, 'message': FAILURE, 'status': 'UNAVAILABLE'}})}\r\n\r\n"
            return
        if number == 2 and model == "cut":
            return
        if number == 2 and model == "waits":
            await provider.waits()
        yield content({"text": word, **({"thought": True} if model == "thinking" and number < 2 else {})})
    yield content({"text": ""}, finishReason="STOP")
