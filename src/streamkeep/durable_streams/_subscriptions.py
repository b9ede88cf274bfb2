"""Subscriptions: what the rules of `_wakes` say is done here: read, asked, committed, delivered.

Each process that serves has all subscriptions, notes what is appended through it, and does what is due. Which of them makes a wake is
decided by the commit of the subscription's head; when one dies, its leases end, and another one goes on.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import anyio
import msgspec

from .._background import Background, Task
from .._guard import GuardedStorage, commit_once
from .._lifecycle import version_after
from ..errors import StorageCorruptError, StorageError
from ..events import encode_json
from ..storage import Head
from . import _paths, _rules, _wakes
from ._rules import Append, Stream
from ._streams import Streams
from ._wakes import FENCED, NOWHERE, Config, Link, Noted, Place, Refusal, Subscription
from ._webhooks import Signer, WebhookFailedError, WebhookRejectedError, post

logger: Final = logging.getLogger("streamkeep")

LOOK_SECONDS: Final = 20.0
"""How often a subscription is looked at: other processes may have changed it, or died."""
LATER_SECONDS: Final = 0.5
"""How much later than whoever has made a wake others see to it."""
RETRY_SECONDS: Final = 1.0
MAX_WITHIN_SECONDS: Final = 30.0
REFRESHED_LINKS: Final = 256
AT_ONCE: Final = 16
LOADED_SECONDS: Final = 10.0
BUSY_SECONDS: Final = 0.05
"""How often at most it is noted what is appended while a wake is in flight anyway."""
_NOT_FOUND: Final = Refusal(404, "SUBSCRIPTION_NOT_FOUND", "there is no such subscription")
KNOWN_PATHS: Final = 10_000
AGAIN_SECONDS: Final = 60.0
"""How often all streams are looked at, at most: what a process has appended that died before it told anybody."""
AGAIN_PART: Final = 0.05
"""How much of the time that takes, at most."""

BACKFILL_SECONDS: Final = 30.0
BACKFILL_LOOK_SECONDS: Final = 0.2

Change = Callable[[Subscription, float], "Subscription | Refusal"]
Note = Callable[[Subscription, Mapping[str, Link]], "Noted | Refusal"]
"""Says what becomes of a subscription, of whose links those that are asked for and parked are given."""


class Subscriptions:
    """All subscriptions of a storage."""

    def __init__(
        self, storage: GuardedStorage, background: Background, streams: Streams, *, allow_local: bool, max_subscriptions: int
    ) -> None:
        self._storage = storage
        self._background = background
        self._streams = streams
        self._allow_local = allow_local
        self._max = max_subscriptions
        self._workers: dict[str, _Worker] = {}
        self._by_path: dict[str, tuple[_Worker, ...]] = {}
        self._signer: Signer | None = None
        self._loaded = anyio.Event()

    # Which there are

    async def run(self) -> None:
        """Know all subscriptions, whoever makes them."""
        while True:
            try:
                async with self._storage.watch(_paths.REGISTRY) as doorbell:
                    while True:
                        await self._load()
                        self._loaded.set()
                        with anyio.move_on_after(LOOK_SECONDS):
                            await doorbell.wait()
            except StorageError as error:
                logger.warning("subscriptions cannot be read now: %s", error)
            await anyio.sleep(RETRY_SECONDS)

    async def _load(self) -> None:
        after, found = _paths.SUBSCRIPTION, dict[str, Subscription]()
        while page := [item for item in await self._storage.scan(after, 100) if item[0].startswith(_paths.SUBSCRIPTION)]:
            for id, head in page:
                after = id
                try:
                    found[id] = _wakes.subscription_of(head)
                except StorageCorruptError as error:
                    logger.warning("a subscription cannot be read: %s", error)
        for id, subscription in found.items():
            self._have(id, subscription)
        for id in self._workers.keys() - found.keys():
            self._drop(id)
        await self._forget_parked({_paths.cursors_of(id, there.life) for id, there in found.items()})

    async def _forget_parked(self, alive: Collection[str]) -> None:
        """Remove the parked links of subscriptions that are no more; `alive` is what the ids of others begin with."""
        after = _paths.CURSOR
        while (page := await self._storage.scan(after, 100)) and page[0][0].startswith(_paths.CURSOR):
            id, life = _paths.owner_of(page[0][0])
            begin = _paths.cursors_of(id, life)
            there = None if begin in alive else await self._read(id)
            if begin in alive or (there is not None and there.life == life):
                after = begin + "~"  # behind all of them
                continue
            for cursor, head in page:
                if cursor.startswith(begin):
                    await self._storage.delete(cursor, head.version)
                    after = cursor

    async def look_again(self) -> None:
        """Note, again and again, what was appended by who has died since."""
        while True:
            await anyio.sleep(AGAIN_SECONDS)
            for worker in tuple(self._workers.values()):
                began = anyio.current_time()
                try:
                    await worker.look()
                except StorageError as error:
                    logger.warning("the streams of a subscription cannot be looked at now: %s", error)
                await anyio.sleep((anyio.current_time() - began) / AGAIN_PART)

    def _have(self, id: str, there: Subscription) -> "_Worker":
        worker = self._workers.get(id)
        if worker is None or worker.life != there.life:
            self._drop(id)
            worker = self._workers[id] = _Worker(self, id, there)
            worker.start(self._background)
        self._relink(worker, there)
        return worker

    def _relink(self, worker: "_Worker", there: Subscription) -> None:
        explicit = _explicit(there)
        if worker.config != there.config or worker.explicit != explicit:
            worker.config, worker.explicit = there.config, explicit
            self._by_path.clear()  # who wants a path's changes may be somebody else now

    def _drop(self, id: str) -> None:
        worker = self._workers.pop(id, None)
        if worker is not None:
            worker.stop()
            self._by_path.clear()

    def changed(self, stream: Stream) -> None:
        """Note that a stream has grown."""
        if not self._workers:
            return
        path = stream.state.path
        workers = self._by_path.get(path)
        if workers is None:
            if len(self._by_path) >= KNOWN_PATHS:
                self._by_path.clear()
            workers = self._by_path[path] = tuple(worker for worker in self._workers.values() if worker.wants(path))
        place = _place_of(stream)
        for worker in workers:
            worker.notice(path, place)

    async def signer(self) -> Signer:
        """Give what signs for all processes of this storage. Raises StorageError."""
        while self._signer is None:
            page = await self._storage.read(_paths.SIGNING_KEY)
            if page is not None:
                self._signer = Signer(page.head.state)
                break
            head = Head(version_after(0, self._storage.time(), self._streams.by), 0, secrets.token_bytes(32), _rules.NEVER)
            await commit_once(self._storage, _paths.SIGNING_KEY, None, head)
        return self._signer

    # What clients ask for

    async def create(self, name: str, config: Config, base_url: str) -> tuple[int, Subscription | Refusal]:
        """Create a subscription, or find it as it is asked for; give the HTTP status. Raises StorageError."""
        id = _paths.subscription_id(name)
        while True:
            with anyio.move_on_after(LOADED_SECONDS):
                await self._loaded.wait()
            page = await self._storage.read(id)
            if page is not None:
                there = _wakes.subscription_of(page.head)
                if there.config.hash != config.hash:
                    return 409, Refusal(409, "SUBSCRIPTION_ALREADY_EXISTS", "there is another one with this id")
                await self._have(id, there).backfill()
                return 200, await self._read(id) or there
            if len(self._workers) >= self._max:
                return 429, Refusal(429, "RATE_LIMITED", "there are as many subscriptions as there may be")
            now, by = self._storage.time(), self._streams.by
            there = Subscription(name, secrets.token_hex(8), by, config, now, base_url)
            there = _wakes.link(there, await self._places(config.streams), {}, explicit=True).there
            if not await commit_once(self._storage, id, None, _wakes.head_of(there, 0, now, by)):
                continue
            # From here on each process notes what is appended; what was there before is linked as it is now.
            worker = self._have(id, there)
            await self._ring_registry()
            await worker.backfill()
            return 201, await self._read(id) or there

    async def _ring_registry(self) -> None:
        while True:
            page = await self._storage.read(_paths.REGISTRY)
            version = None if page is None else page.head.version
            now = self._storage.time()
            state = secrets.token_bytes(8)
            head = Head(version_after(version or 0, now, self._streams.by), 0, state, _rules.NEVER)
            if await commit_once(self._storage, _paths.REGISTRY, version, head):
                return

    async def _read(self, id: str) -> Subscription | None:
        page = await self._storage.read(id)
        return None if page is None else _wakes.subscription_of(page.head)

    async def get(self, name: str) -> Subscription | Refusal:
        """Give a subscription as it is. Raises StorageError."""
        return await self._read(_paths.subscription_id(name)) or _NOT_FOUND

    async def delete(self, name: str) -> None:
        """Forget a subscription: what its workers still send is refused. Raises StorageError."""
        id = _paths.subscription_id(name)
        while (page := await self._storage.read(id)) is not None:
            if await self._storage.delete(id, page.head.version):
                break
        self._drop(id)
        await self._ring_registry()

    async def add(self, name: str, paths: Sequence[str]) -> Subscription | Refusal:
        """Link streams explicitly, at their current tails. Raises StorageError."""
        places = await self._places(paths)
        changed = await self._note(_paths.subscription_id(name), paths, lambda there, parked: _wakes.add(there, places, parked))
        await self._relinked(name, changed)
        return changed

    async def remove(self, name: str, path: str) -> Subscription | Refusal:
        """Remove an explicit link. Raises StorageError."""
        changed = await self.change(name, lambda there, _: _wakes.unlink(there, path))
        await self._relinked(name, changed)
        return changed

    async def _relinked(self, name: str, changed: Subscription | Refusal) -> None:
        if isinstance(changed, Subscription):
            self._have(_paths.subscription_id(name), changed)
            await self._ring_registry()

    async def claim(self, name: str, worker: str) -> tuple[Subscription, str] | Refusal:
        """Give a worker the lease, and its token. Raises StorageError."""
        await self._refresh(name)
        if isinstance(there := await self.get(name), Subscription):
            await self.look(_paths.subscription_id(name), there)
        wake_id = _new_wake()

        def change(there: Subscription, now: float) -> Subscription | Refusal:
            if there.config.type != "pull-wake":
                return Refusal(409, "INVALID_REQUEST", "webhook subscriptions are not claimed")
            return _wakes.claim(there, worker, now, wake_id)

        changed = await self.change(name, change)
        if isinstance(changed, Refusal):
            return changed
        signer = await self.signer()
        return changed, signer.token("claim", name, changed.life, changed.generation, self._storage.time())

    async def ack(
        self, name: str, kind: str, token: str, wake_id: str, generation: int, acks: Mapping[str, str], *, done: bool
    ) -> tuple[bool, Subscription] | Refusal:
        """Note what a worker has processed; say whether another wake follows. Raises StorageError."""
        if (refusal := await self._check(name, kind, token)) is not None:
            return refusal
        there = await self.get(name)
        if isinstance(there, Subscription):
            late = [path for path, offset in acks.items() if (link := there.links.get(path)) is None or offset > link.tail]
            await self._look_at(name, late)
        changed = await self.change(
            name, self._if_current(token, lambda there, now: _wakes.ack(there, wake_id, generation, acks, now, done=done))
        )
        if isinstance(changed, Refusal):
            return changed
        if done:
            self._push(name)
        return done and (changed.is_pending or changed.waiting > 0), changed

    async def release(self, name: str, token: str, wake_id: str, generation: int) -> Subscription | Refusal:
        """End a lease. Raises StorageError."""
        if (refusal := await self._check(name, "claim", token)) is not None:
            return refusal
        changed = await self.change(
            name, self._if_current(token, lambda there, now: _wakes.release(there, wake_id, generation, now))
        )
        self._push(name)
        return changed

    def _if_current(self, token: str, change: Change) -> Change:
        said = None if self._signer is None else self._signer.read(token)

        def checked(there: Subscription, now: float) -> Subscription | Refusal:
            if said is None or (said.life, said.generation) != (there.life, there.generation):
                return FENCED
            return change(there, now)

        return checked

    async def _check(self, name: str, kind: str, token: str) -> Refusal | None:
        said = (await self.signer()).read(token)
        if said is None or (said.kind, said.subscription) != (kind, name):
            return Refusal(401, "TOKEN_INVALID", "the token is not one for this")
        if said.expires_at < self._storage.time():
            return Refusal(401, "TOKEN_EXPIRED", "the token has expired")
        return None

    async def change(self, name: str, change: Change) -> Subscription | Refusal:
        """Change a subscription by a rule. Raises StorageError."""
        return await self.change_by_id(_paths.subscription_id(name), change)

    async def change_by_id(self, id: str, change: Change) -> Subscription | Refusal:
        """Change a subscription by a rule. Raises StorageError."""
        while True:
            page = await self._storage.read(id)
            if page is None:
                return _NOT_FOUND
            there = _wakes.subscription_of(page.head)
            changed = change(there, self._storage.time())
            if isinstance(changed, Refusal) or changed == there or await self._commit(id, page.head.version, changed):
                return changed

    async def _commit(self, id: str, seen: int, changed: Subscription) -> bool:
        head = _wakes.head_of(changed, seen, self._storage.time(), secrets.token_hex(8))
        if not await commit_once(self._storage, id, seen, head):
            return False
        worker = self._workers.get(id)
        if worker is not None:
            self._relink(worker, changed)
            worker.know(changed)
        return True

    def _push(self, name: str) -> None:
        worker = self._workers.get(_paths.subscription_id(name))
        if worker is not None:
            worker.push()

    async def _refresh(self, name: str) -> None:
        """Note how far the streams of a subscription go, whoever has appended."""
        worker = self._workers.get(_paths.subscription_id(name))
        if worker is not None:
            await worker.flush()
        there = await self.get(name)
        if isinstance(there, Subscription) and not there.is_pending and len(there.links) <= REFRESHED_LINKS:
            await self._look_at(name, list(there.links))

    async def _look_at(self, name: str, paths: Sequence[str]) -> None:
        if paths:
            await self.note(_paths.subscription_id(name), await self._places(paths))

    async def note(self, id: str, found: Mapping[str, Place]) -> Subscription | Refusal:
        """Note how far streams go. Raises StorageError."""
        # Of two streams that were under a path, one after the other, the one that is there now is the later one.
        newest: dict[str, Place] = {}
        unsure: Sequence[str]

        def notice(there: Subscription, parked: Mapping[str, Link]) -> Noted:
            nonlocal unsure
            known = {**parked, **there.links}
            lives = {path: known[path].life for path in found if path in known}
            unsure = [path for path, life in lives.items() if path not in newest and life != found[path].life]
            return Noted(there, {}) if unsure else _wakes.notice(there, {**found, **newest}, parked)

        while True:
            unsure = ()
            noted = await self._note(id, list(found), notice)
            if not unsure:
                return noted
            newest |= await self._places(unsure)

    async def _note(self, id: str, paths: Sequence[str], note: Note) -> Subscription | Refusal:
        """Change a subscription's links; what has no room in its head is stored before that is."""
        while True:
            page = await self._storage.read(id)
            if page is None:
                return _NOT_FOUND
            there = _wakes.subscription_of(page.head)
            unlinked = [path for path in paths if path not in there.links and _wakes.covers(there.config, path)]
            noted = note(there, await self._parked(id, there, unlinked))
            if isinstance(noted, Refusal):
                return noted
            await self._park(id, there.life, noted.parked)
            if noted.there == there or await self._commit(id, page.head.version, noted.there):
                return noted.there

    async def _parked(self, id: str, there: Subscription, paths: Sequence[str]) -> Mapping[str, Link]:
        """Give those links that are parked, of some streams."""
        parked: dict[str, Link] = {}

        async def read(path: str) -> None:
            page = await self._storage.read(_paths.cursor_id(id, there.life, path))
            if page is not None:
                parked[path] = _wakes.parked_of(page.head).link

        if there.has_parked:
            await _for_each(paths, read)
        return parked

    async def _park(self, id: str, life: str, links: Mapping[str, Link]) -> None:
        async def write(path: str) -> None:
            cursor, link, by = _paths.cursor_id(id, life, path), links[path], self._streams.by
            seen = None
            while not await commit_once(self._storage, cursor, seen, _wakes.parked_head(path, link, seen or 0, self.now(), by)):
                page = await self._storage.read(cursor)
                seen = None if page is None else page.head.version
                link = links[path] if page is None else _wakes.merged(_wakes.parked_of(page.head).link, links[path])

        await _for_each(list(links), write)

    async def _places(self, paths: Sequence[str]) -> Mapping[str, Place]:
        """Give where streams are now."""
        places: dict[str, Place] = {}

        async def read(path: str) -> None:
            stream = await self._streams.find(path)
            is_there = stream is not None and _rules.absence(stream, self.now()) is None
            places[path] = _place_of(stream) if is_there and stream is not None else NOWHERE

        await _for_each(paths, read)
        return places

    async def look(
        self, id: str, there: Subscription, *, but: Collection[str] = (), wake_id: str = ""
    ) -> Subscription | Refusal:
        """Note which streams that wait for a worker are gone, or are others by now; `but` have just grown here. Raises StorageError."""
        waiting = {path: link.tail for path, link in there.links.items() if link.is_pending and path not in but}
        moved = {path: place for path, place in (await self._places(list(waiting))).items() if place.life}
        gone = {path: waiting[path] for path in waiting.keys() - moved.keys()}
        if not gone and _wakes.notice(there, moved, {}).there == there:
            return there

        def change(there: Subscription, parked: Mapping[str, Link]) -> Noted:
            noted = _wakes.notice(there, moved, parked)
            return Noted(_wakes.forget(noted.there, gone, self.now(), wake_id), noted.parked)

        return await self._note(id, list(moved), change)

    # What a worker does for its subscription

    def now(self) -> float:
        """Give the storage's time."""
        return self._storage.time()

    async def catch_up(self, id: str) -> None:
        """Note how far the streams of a subscription go, and those of its pattern that are not linked. Raises StorageError."""
        there = await self._read(id)
        if there is None:
            return
        await self.note(id, await self._places([path for path, link in there.links.items() if not link.is_pending]))
        after = _paths.STREAM
        while there.config.pattern and (page := await self._scanned(after)):
            after = page[-1][0]
            streams = [_rules.stream_of(head) for _, head in page]
            found = {
                stream.state.path: _place_of(stream)
                for stream in streams
                if stream.head.tail
                and stream.state.path not in there.links
                and _wakes.covers(there.config, stream.state.path)
                and _rules.absence(stream, self.now()) is None
            }
            if found:
                await self.note(id, found)

    async def _scanned(self, after: str) -> list[tuple[str, Head]]:
        return [item for item in await self._storage.scan(after, 500) if item[0].startswith(_paths.STREAM)]

    async def backfill(self, id: str, config: Config) -> None:
        """Link the streams that match a pattern, as they are now. Raises StorageError."""
        there = await self._read(id)
        if there is None or there.is_backfilled:
            return
        places: dict[str, Place] = {}
        after = _paths.STREAM
        while page := await self._scanned(after):
            after = page[-1][0]
            for _, head in page:
                stream = _rules.stream_of(head)
                if _wakes.covers(config, stream.state.path) and _rules.absence(stream, self.now()) is None:
                    places[stream.state.path] = _place_of(stream)
        await self._note(id, list(places), lambda there, parked: _backfilled(there, places, parked))

    async def others_backfill(self, id: str) -> None:
        """Let who has created a subscription do that: each link that has no room is stored. Raises StorageError."""
        while (there := await self._read(id)) is not None and not there.is_backfilled:
            pause = there.created_at + BACKFILL_SECONDS - self.now()
            if pause <= 0.0:
                return
            await anyio.sleep(min(pause, BACKFILL_LOOK_SECONDS))

    async def unpark(self, id: str) -> None:
        """Link again what is parked, and has something to be processed, as far as there is room. Raises StorageError."""
        while (page := await self._storage.read(id)) is not None:
            there = _wakes.subscription_of(page.head)
            # Not each link alone: all that are parked are looked through for them.
            if not there.waiting or (there.room < _wakes.MAX_LINKS // 2 and there.is_pending) or not there.room:
                return
            found, are_all = await self._waiting(id, there)
            noted = _wakes.unparked(there, found, are_all=are_all)
            await self._park(id, there.life, noted.parked)
            if noted.there == there or await self._commit(id, page.head.version, noted.there):
                return

    async def _waiting(self, id: str, there: Subscription) -> tuple[Mapping[str, Link], bool]:
        """Give as many parked links with something to be processed as there is room for, and whether there are no more."""
        found, room = dict[str, Link](), there.room
        after = begin = _paths.cursors_of(id, there.life)
        while page := [item for item in await self._storage.scan(after, 500) if item[0].startswith(begin)]:
            for after, head in page:  # noqa: B007 - where the next page begins
                parked = _wakes.parked_of(head)
                if parked.link.is_pending and parked.path not in there.links:
                    if len(found) == room:
                        return found, False
                    found[parked.path] = parked.link
        return found, True

    async def deliver(self, id: str, there: Subscription) -> None:
        """Tell the worker of a wake. Raises StorageError."""
        wake = there.wake
        assert wake is not None
        if there.config.type == "webhook":
            await self._call(id, there)
            return
        pending = next((path for path, link in there.links.items() if link.is_pending), "")
        event = {
            "type": "wake",
            "subscription_id": there.id,
            "stream": pending,
            "generation": there.generation,
            "ts": int(self._storage.time() * 1_000),
        }
        answer = await self._streams.append(there.config.wake_stream, Append(encode_json(event), "application/json"))
        if answer.code < 300:
            await self.change_by_id(id, lambda now_there, _: _wakes.announced(now_there, wake.id))
        else:
            logger.warning("a wake cannot be announced in %s: %s", there.config.wake_stream, answer.reason)
            await self.change_by_id(id, lambda now_there, now: _wakes.failed(now_there, wake.id, now))

    async def _call(self, id: str, there: Subscription) -> None:
        wake = there.wake
        assert wake is not None
        signer, now = await self.signer(), self._storage.time()
        body = encode_json(
            {
                "subscription_id": there.id,
                "wake_id": wake.id,
                "generation": there.generation,
                "streams": linked(there),
                "callback_url": f"{there.base_url}{callback_path(there.id)}",
                "callback_token": signer.token("callback", there.id, there.life, there.generation, now),
            }
        )
        headers = {"content-type": "application/json", "webhook-signature": signer.signature(body, now)}
        within = min(there.lease, MAX_WITHIN_SECONDS)
        try:
            answer = await post(there.config.url, body, headers, within=within, allow_local=self._allow_local)
        except (WebhookFailedError, WebhookRejectedError) as error:
            logger.warning("a webhook of subscription %r was not delivered: %s", there.id, error)
            await self.change_by_id(id, lambda now_there, now: _wakes.failed(now_there, wake.id, now))
            return
        done = _says_done(answer)
        await self.change_by_id(id, lambda now_there, _: _wakes.delivered(now_there, wake.id, done=done))


class _Worker:
    """Sees to one subscription: notes what is appended, and does what is due."""

    def __init__(self, subscriptions: Subscriptions, id: str, there: Subscription) -> None:
        self.life: Final = there.life
        self.config = there.config
        self.explicit = _explicit(there)
        self._subscriptions = subscriptions
        self._id = id
        self._is_backfilled = there.is_backfilled or not there.config.pattern
        self._noticed: dict[str, Place] = {}
        self._due_at = _wakes.due_at(there)
        self._pushed = anyio.Event()
        self._turn = anyio.Lock()
        self._is_busy = False
        self._is_waiting = there.waiting > 0  # parked links do, as far as is known here
        self._task: Task | None = None

    def start(self, background: Background) -> None:
        self._background = background
        self._task = background.start(self._run, "seeing to a subscription")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def wants(self, path: str) -> bool:
        return path in self.explicit or _wakes.covers(self.config, path)

    def notice(self, path: str, place: Place) -> None:
        self._noticed[path] = place
        self.push()

    def push(self) -> None:
        self._due_at = 0.0
        self._pushed.set()

    def know(self, there: Subscription) -> None:
        self._is_waiting = there.waiting > 0
        self._due_at = _wakes.due_at(there)
        self._pushed.set()

    async def backfill(self) -> None:
        if self._is_backfilled:
            return
        async with self._turn:
            if not self._is_backfilled:
                await self._subscriptions.backfill(self._id, self.config)
                self._is_backfilled = True

    async def flush(self) -> None:
        await self.backfill()  # what is not linked is taken for new
        async with self._turn:
            await self._flush()
            await self._subscriptions.unpark(self._id)

    async def look(self) -> None:
        await self.backfill()
        await self._subscriptions.catch_up(self._id)
        self.push()

    async def _flush(self) -> None:
        noticed, self._noticed = self._noticed, {}
        if not noticed:
            return
        try:
            await self._subscriptions.note(self._id, noticed)
        except BaseException:
            self._noticed = {**noticed, **self._noticed}
            raise

    async def _run(self) -> None:
        first = True
        while True:
            self._pushed = anyio.Event()
            try:
                if not self._is_backfilled:
                    await self._subscriptions.others_backfill(self._id)
                    await self.backfill()
                if first:
                    # What was appended before this process was there, in case that whoever it went through has died.
                    await self._subscriptions.catch_up(self._id)
                    first = False
                await self._step()
            except StorageError as error:
                logger.warning("a subscription cannot be seen to now: %s", error)
                await anyio.sleep(RETRY_SECONDS)
                continue
            if self._is_busy:
                await anyio.sleep(BUSY_SECONDS)
            with anyio.move_on_after(min(LOOK_SECONDS, max(0.0, self._due_at - self._subscriptions.now()))):
                await self._pushed.wait()

    async def _step(self) -> None:
        async with self._turn:
            grown = set(self._noticed)
            await self._flush()
            if self._is_waiting:
                await self._subscriptions.unpark(self._id)
            wake_id = _new_wake()
            there = await self._subscriptions.change_by_id(self._id, lambda there, now: _wakes.advance(there, now, wake_id))
            if isinstance(there, Subscription) and there.wake is not None and there.wake.id == wake_id:
                there = await self._subscriptions.look(self._id, there, but=grown, wake_id=wake_id)
        if isinstance(there, Refusal):
            self._due_at = _rules.NEVER
            return
        self._due_at = _wakes.due_at(there)
        if there.waiting and not self._is_waiting:  # another process has parked some
            self._is_waiting = True
            self.push()
        wake, now = there.wake, self._subscriptions.now()
        self._is_busy = wake is not None
        if wake is None or wake.is_announced:
            return
        is_ours = wake.id == wake_id
        is_late = there.config.type == "pull-wake" and not wake.holder and wake.issued_at + _wakes.ANNOUNCE_SECONDS <= now
        if is_ours or is_late:
            self._background.start(lambda: self._deliver(there), "delivering a wake")

    async def _deliver(self, there: Subscription) -> None:
        try:
            await self._subscriptions.deliver(self._id, there)
        except StorageError as error:
            logger.warning("a wake cannot be delivered now: %s", error)
        self.push()


async def _for_each(paths: Sequence[str], do: Callable[[str], Awaitable[None]]) -> None:
    """Do something for each of some paths, several at once. What is raised comes bare."""
    rest = iter(paths)

    async def do_rest() -> None:
        for path in rest:
            await do(path)

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(min(len(paths), AT_ONCE)):
                tasks.start_soon(do_rest)
    except ExceptionGroup as group:
        raise group.exceptions[0] from group  # who asked knows the errors of a storage, and no groups of them


def _explicit(there: Subscription) -> Collection[str]:
    """Give the streams that a subscription has, whatever its pattern is."""
    return {path for path, link in there.links.items() if link.is_explicit}


def _place_of(stream: Stream) -> Place:
    state = stream.state
    begin = max(state.base, stream.earliest)
    return Place(state.life, _rules.offset_of(state, begin), _rules.offset_of(state, stream.tail))


def _backfilled(there: Subscription, places: Mapping[str, Place], parked: Mapping[str, Link]) -> Noted:
    return Noted(there, {}) if there.is_backfilled else _wakes.link(there, places, parked, explicit=False)


def linked(there: Subscription) -> list[dict[str, object]]:
    """Give the links of a subscription as a wake tells of them."""
    return [
        {
            "path": path,
            "link_type": "explicit" if link.is_explicit else "glob",
            "acked_offset": link.acked,
            "tail_offset": link.tail,
            "has_pending": link.is_pending,
        }
        for path, link in there.links.items()
    ]


def callback_path(name: str) -> str:
    """Give the path below the root of all streams to which a webhook's worker answers."""
    from urllib.parse import quote

    return f"/{_paths.CONTROL}/subscriptions/{quote(name, safe='')}/callback"


def _says_done(answer: bytes) -> bool:
    try:
        said = msgspec.json.decode(answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("done") is True


def _new_wake() -> str:
    return f"w_{secrets.token_hex(12)}"
