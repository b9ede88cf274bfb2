"""A durable view of Django's."""

import django
from django.conf import settings
from django.test import Client
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__, SECRET_KEY="only for tests", ALLOWED_HOSTS=["*"], STREAMKEEP_URL="memory://", MIDDLEWARE=[]
)
django.setup()

from streamkeep.http import SSEFraming
from streamkeep.integrations.django import DjangoStreams

streams = DjangoStreams()


def ask(request):
    return streams.respond(request, iter(["Nothing", "is", "lost"]), id="answer", framing=SSEFraming())


urlpatterns = [path("ask", ask)]
answer = Client().post("/ask")
assert answer.status_code == 200
assert b'data: "lost"' in answer.getvalue()
