"""The site of Django's that servers under test run, under WSGI and ASGI; and its management commands."""

# pyright: reportMissingTypeStubs=false

import os
import sys
from collections.abc import AsyncGenerator
from typing import Any, Final

import anyio
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from tests.web.words import CHECK_TOKEN, OPTIONS, connected, words

from streamkeep.http import SSEFraming
from streamkeep.integrations.django import DjangoStreams

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="-",
        DEBUG=False,
        MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        WSGI_APPLICATION=f"{__name__}.app",
    )

streams: Final = DjangoStreams(connected, **OPTIONS)


def process(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()).encode())


def chat(request: Any, chat: str) -> Any:
    match request.META["REQUEST_METHOD"]:
        case "POST":
            return streams.respond(request, words(request.GET), key=chat, framing=SSEFraming())
        case "GET":
            return streams.follow(request, key=chat)
        case _:
            return streams.cancel(request, key=chat)


async def awaiting(request: Any, chat: str) -> Any:
    async def all_words() -> AsyncGenerator[object]:
        pause = int(request.GET.get("ms", "0")) / 1000
        for word in range(int(request.GET.get("n", "3"))):
            yield {"word": word}
            await anyio.sleep(pause)

    match request.META["REQUEST_METHOD"]:
        case "POST":
            return await streams.arespond(request, all_words(), key=chat, framing=SSEFraming())
        case "GET":
            return await streams.afollow(request, key=chat)
        case _:
            return await streams.acancel(request, key=chat)


urlpatterns: Final = [
    path("process", process),
    path("chat/<chat>", chat),
    path("awaiting/<chat>", awaiting),
    path("check/", include((streams.check_urls(trust=CHECK_TOKEN), "check"))),
]
app: Final = get_wsgi_application()
asgi: Final = get_asgi_application()


def manage() -> None:
    """Be `manage.py`."""
    execute_from_command_line(sys.argv)
