"""The bare driver for NATS: a message a commit, conditional on the subject's last sequence, as many under way as there are writers."""

import asyncio
import json
import time
from typing import Self
from urllib.parse import parse_qs, urlsplit

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.answer import CHUNK
from benchmarks.bare import STATE, encode

PAGE = 512


class Bare:
    """nats-py by hand: head and record in one message. Batches would be slower: an atomic one of 64 takes longer than 64 publishes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._servers = [f"nats://{host}" for host in parts.netloc.split(",")]
        self._replicas = int(parse_qs(parts.query).get("replicas", ["1"])[0])
        self._count = 0

    async def __aenter__(self) -> Self:
        self._client = await nats.connect(self._servers)
        self._name = f"bare-{time.time_ns()}"
        config = {
            "name": self._name,
            "subjects": [f"{self._name}.s.*"],
            "num_replicas": self._replicas,
            "allow_direct": True,
            "republish": {"src": f"{self._name}.s.*", "dest": f"{self._name}.bell.{{{{wildcard(1)}}}}", "headers_only": True},
        }
        await self._client.request(f"$JS.API.STREAM.CREATE.{self._name}", json.dumps(config).encode(), timeout=10)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.request(f"$JS.API.STREAM.DELETE.{self._name}", b"", timeout=10)
        await self._client.close()

    async def append(self, writers: int, each: int) -> float:
        subjects = [self._subject() for _ in range(writers)]
        started = time.perf_counter()
        await asyncio.gather(*(self._write(subject, each) for subject in subjects))
        return writers * each / (time.perf_counter() - started)

    async def replay(self, count: int) -> float:
        subject = self._subject()
        await asyncio.gather(*(self._client.request(subject, self._message(), timeout=30) for _ in range(count)))
        started = time.perf_counter()
        read, sequence = 0, 0
        while read < count:
            for message in await self._page(self._client, subject, sequence + 1):
                sequence = int((message.headers or {})["Nats-Sequence"])
                read += 1
        return read / (time.perf_counter() - started)

    async def deliver(self, count: int) -> list[float]:
        reader = await nats.connect(self._servers)
        subject = self._subject()
        bells = await reader.subscribe(subject.replace(".s.", ".bell."))
        await reader.request(f"$JS.API.STREAM.INFO.{self._name}", b"", timeout=10)
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            await self._client.publish(subject, self._message())
            await bells.next_msg(timeout=10)
            last = json.dumps({"last_by_subj": subject}).encode()
            await reader.request(f"$JS.API.STREAM.MSG.GET.{self._name}", last, timeout=10)
            taken.append(time.perf_counter() - started)
        await reader.close()
        return taken

    async def _write(self, subject: str, each: int) -> None:
        jetstream = self._client.jetstream()
        last = 0
        for _ in range(each):
            condition = {"Nats-Expected-Last-Subject-Sequence": str(last)}
            last = (await jetstream.publish(subject, self._message(), headers=condition, timeout=30)).seq

    async def _page(self, client: Client, subject: str, sequence: int) -> list[Msg]:
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        body = json.dumps({"seq": sequence, "next_by_subj": subject, "batch": PAGE}).encode()
        await client.publish(f"$JS.API.DIRECT.GET.{self._name}", body, reply=inbox)
        page = []
        while (message := await answers.next_msg(timeout=10)).data:
            page.append(message)
        await answers.unsubscribe()
        return page

    def _subject(self) -> str:
        self._count += 1
        return f"{self._name}.s.{self._count}"

    def _message(self) -> bytes:
        return STATE + b"c" + encode(CHUNK)
