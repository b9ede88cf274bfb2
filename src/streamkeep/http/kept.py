"""What is kept of an answer that has passed through: with the stream, as text, so that every later answer with it is the same."""

from typing import Final

import msgspec

from .framing import Framing, PassThroughFraming, TextFraming, media_type_of
from .ui_messages import MARK, UIMessagesFraming

ANSWER: Final = "answer"
"""The name in a stream's metadata under which it is kept how an answer was that was passed through; empty if it was Genkit's."""
ENDPOINTS_OWN: Final = "endpoint"
"""What is kept there of a stream that an endpoint has started, which shows it as it likes."""


class KeptAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What every later answer with the same stream must say as well."""

    content_type: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def is_sse(self) -> bool:
        """Whether it is of server-sent events; text otherwise."""
        return media_type_of(self.content_type) == "text/event-stream"


def keep_answer(answer: KeptAnswer) -> str:
    """Give what is kept of an answer, as text."""
    return msgspec.json.encode(answer).decode()


def kept_framing(text: str, *, id_first: bool) -> Framing:
    """Give the framing of an answer that was kept."""
    answer = msgspec.json.decode(text, type=KeptAnswer)
    if answer.is_sse and any(name == MARK for name, _ in answer.headers):
        return UIMessagesFraming(content_type=answer.content_type, headers=answer.headers, is_passed_through=True)
    if answer.is_sse:
        return PassThroughFraming(content_type=answer.content_type, headers=answer.headers, id_first=id_first)
    return TextFraming(answer.content_type, answer.headers)
