"""The app's tasks and the streams of their turns, as the store and the event stream that the SDK asks. See `a2a`."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import anyio
from a2a.server.agent_execution import RequestContext
from a2a.server.agent_execution.active_task import INTERRUPTED_TASK_STATES
from a2a.server.cluster import (
    ConcurrentTaskModificationError,
    StoredTask,
    TaskEventStream,
    TaskVersion,
    VersionedEvent,
    VersionedTaskStore,
)
from a2a.server.context import ServerCallContext
from a2a.server.events import Event
from a2a.server.tasks import TaskStore
from a2a.types import (
    ListTasksRequest,
    ListTasksResponse,
    Task,
    TaskState,
)
from a2a.utils.errors import UnsupportedOperationError
from google.protobuf import json_format

from .._input import StreamInput
from .._listing import StreamInfo
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    KeyInUseError,
    LimitExceededError,
    StorageError,
    StreamAlreadyExistsError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from ..events import StreamEventType
from ._a2a_events import (
    CANCELED,
    STOPPED,
    Place,
    apply,
    end_by,
    event_of,
    has_ended,
    json_of,
    take_place,
    with_place,
)

logger: Final = logging.getLogger("streamkeep")
LOST: Final = (StreamCompletedError, StreamTakenOverError, StreamNotFoundError, StreamInputClosedError)
UNFIT: Final = (LimitExceededError, InvalidArgumentError, json_format.SerializeToJsonError)
LOOK_SECONDS: Final = 30.0
"""How often who waits for a task's next turn looks at the task itself."""
GAP_PAUSES: Final = (0.0, 0.0, 0.0, 0.1, 0.3, 1.0, 3.0)
"""When a store is read again that was behind. It has what is missing before who reads can know of it."""
SAVE_PAUSES: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 60.0, 60.0)
"""When to store again that a task has ended. Until then its stream stays open, for who looks at the task meanwhile."""
UNKNOWN_SECONDS: Final = 1.0
"""How often who follows a task that was stored without us looks at it."""
END_SECONDS: Final = 10.0
"""How long the ends of all tasks may take to be stored when the handler is left, and an agent's own `cancel` when another process asks."""


class _GapError(Exception):
    """A stream has not all of a task, and the store has: it is to be read again."""


class Version(TaskVersion):
    """A place, as the SDK compares them."""

    __slots__ = ("place",)

    def __init__(self, place: Place) -> None:
        super().__init__(f"{place.root}/{place.turn:09}/{place.tail:016}")
        self.place = place


@dataclass(frozen=True, slots=True)
class Seen:
    """A task as it stands.

    Attributes:
        task: the task.
        place: what it has in it; None: it was stored without us. Between two turns, the beginning of the next one.
        is_open: whether that turn is open: its agent runs somewhere.
    """

    task: Task
    place: Place | None
    is_open: bool = False

    @property
    def has_ended(self) -> bool:
        return has_ended(self.task)

    @property
    def version(self) -> TaskVersion:
        return TaskVersion.MISSING if self.place is None else Version(self.place)


@dataclass(eq=False, slots=True)
class Turn:
    """A turn that is written here.

    Attributes:
        place: how far it has come.
        seen: how far the SDK knows of it; what it was told has failed may be stored all the same.
        is_run: an agent runs, and more will come; else it ends with its first event.
        last: the task as it was stored last, and for whom.
    """

    place: Place
    seen: Place
    writer: StreamInput
    is_run: bool = False
    last: tuple[Task, ServerCallContext] | None = None
    lock: anyio.Lock = field(default_factory=anyio.Lock)


@dataclass(eq=False, slots=True)
class Run:
    """An agent that runs here.

    Attributes:
        turn: what it writes; None before its first event.
        queued: how many of its events the SDK has not stored yet.
        is_over: whether it has returned.
        scope: cancelled when its turn goes on in another stream.
    """

    turn: Turn | None = None
    queued: int = 0
    is_over: bool = False
    begun: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def until_cancelled(self) -> None:
        """Return when somebody else has ended its turn."""
        await self.begun.wait()
        while (turn := self.turn) is not None:
            with anyio.CancelScope() as self.scope:
                await turn.writer.cancelled.wait()
                return


class Tasks(VersionedTaskStore, TaskEventStream):
    """The app's tasks, and the streams of their turns.

    An event is stored in the turn's stream, then the task in the app's store. So a stored task may be behind, never ahead: who looks at it
    applies what its stream has more.
    """

    def __init__(self, streams: StreamManager, store: TaskStore) -> None:
        self._streams = streams
        self._store = store
        self._turns: dict[str, Turn] = {}  # by root
        self._runs: dict[str, Run] = {}  # by task
        self._later: set[asyncio.Task[None]] = set()

    # What the SDK asks of a store

    async def get(self, task_id: str, context: ServerCallContext) -> StoredTask | None:
        seen = await self.look(task_id, context)
        return None if seen is None else StoredTask(seen.task, seen.version)

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        page = ListTasksResponse()
        page.CopyFrom(await self._store.list(params, context))
        for task in page.tasks:
            take_place(task)
        return page

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        await self._store.delete(task_id, context)

    async def save(
        self,
        task: Task,
        *,
        event: Event | None,
        prev: Task | None,  # noqa: ARG002 - of the SDK's interface
        prev_version: TaskVersion,
        context: ServerCallContext,
    ) -> TaskVersion:
        place = prev_version.place if isinstance(prev_version, Version) else None
        is_cancel = task.status.state == TaskState.TASK_STATE_CANCELED
        turn = self._turn_of(task.id) if place is None else self._turns.get(place.root)
        if turn is None and is_cancel:
            return await self._cancel(task, event, context)
        if turn is None:
            turn = await self._begin_at(task, place, context)
        async with turn.lock:
            if not is_cancel and turn.seen != (place or Place(turn.place.root, 0, 0)):
                raise ConcurrentTaskModificationError(task.id)
            return await self._write(turn, task, event, context)

    def _turn_of(self, task_id: str) -> Turn | None:
        """Give what is written here of a task that was stored without us: its run has begun it."""
        run = self._runs.get(task_id)
        return None if run is None else run.turn

    async def _begin_at(self, task: Task, place: Place | None, context: ServerCallContext) -> Turn:
        """Begin a turn behind what was seen of a task, if nothing has come since."""
        if place is not None:
            seen = await self.look(task.id, context)
            if seen is None or seen.has_ended or seen.is_open or seen.place != place:
                raise ConcurrentTaskModificationError(task.id)
        if (turn := await self._begin(place, task.id)) is None:
            raise ConcurrentTaskModificationError(task.id)
        run = self._runs.get(task.id)
        if run is not None and run.turn is None:
            attach(run, turn)
        return turn

    async def _cancel(self, task: Task, event: Event | None, context: ServerCallContext) -> TaskVersion:
        """Cancel a task that does not run here. Concurrent…Error: it has ended already."""
        while (seen := await self.look(task.id, context)) is not None and not seen.has_ended:
            if seen.is_open and seen.place is not None:
                try:
                    await self._streams.cancel(seen.place.stream)
                except StreamNotFoundError:
                    continue
                seen = await self.look(task.id, context)
                if seen is not None and seen.task.status.state == TaskState.TASK_STATE_CANCELED:
                    return seen.version
            elif (turn := await self._begin(seen.place, task.id)) is not None:
                async with turn.lock:
                    return await self._write(turn, task, event, context)
        raise ConcurrentTaskModificationError(task.id)

    async def _begin(self, place: Place | None, task_id: str) -> Turn | None:
        """Begin a turn; None: somebody else has. Of a task that was stored without us, when his is over."""
        key = None if place is not None else f"a2a {task_id}"
        place = place or Place(f"a2a~{uuid.uuid4().hex}", 0, 0)
        try:
            writer = await self._streams.open(place.stream, key=key)
        except KeyInUseError as error:
            await self._until_over(Place(error.stream.rpartition(".")[0], 0, 0))
            return None
        except StreamAlreadyExistsError:
            return None
        turn = self._turns[place.root] = Turn(place, place, writer)
        return turn

    async def _write(self, turn: Turn, task: Task, event: Event | None, context: ServerCallContext) -> TaskVersion:
        """Store an event, then the task with it, then, if it is the last one, the end of the turn: who begins the next one, in whatever
        process, finds all of it, and nothing is stored behind his back. Concurrent…Error: the turn is somebody else's, or was ended by one.
        """
        is_last = has_ended(task) or not turn.is_run
        try:
            try:
                await turn.writer.write(json_of(task if event is None else event))
            except UNFIT:
                await self._go_on_in_another(turn, task, context)
            else:
                turn.place = turn.place.behind(1)
        except LOST:
            self._drop(turn)
            raise ConcurrentTaskModificationError(task.id) from None
        except StorageError:
            self._give_up(turn)
            raise
        stored = with_place(task, turn.place)
        turn.last = stored, context
        if is_last:
            self._drop(turn)
            await self._save_last(turn, stored, context)
        else:
            await self._store.save(stored, context)
        turn.seen = turn.place
        return Version(turn.place)

    async def _save_last(self, turn: Turn, task: Task, context: ServerCallContext) -> None:
        try:
            await self._store.save(task, context)
        except BaseException as error:
            self._later.add(later := asyncio.create_task(self._save_later(turn, task, context)))
            later.add_done_callback(self._later.discard)
            if isinstance(error, Exception):
                logger.exception("task %s: its end is in its stream, and not in the store yet", task.id)
            raise
        await self._end_writer(turn)

    async def _save_later(self, turn: Turn, task: Task, context: ServerCallContext) -> None:
        for pause in SAVE_PAUSES:
            await anyio.sleep(pause)
            try:
                await self._store.save(task, context)
                break
            except Exception as error:
                logger.warning("task %s: its end could not be stored: %s", task.id, type(error).__qualname__)
        await self._end_writer(turn)

    async def _end_writer(self, turn: Turn) -> None:
        try:
            await turn.writer.done()
        except LOST:
            pass  # by somebody who came too late: the task has ended
        except StreamkeepError as error:
            logger.warning("stream %s: the end of its turn could not be stored: %s", turn.place.stream, error)

    async def _go_on_in_another(self, turn: Turn, task: Task, context: ServerCallContext) -> None:
        """Go on behind an event that does not fit into the stream. Who follows is told to look at the task, so that is stored first."""
        old, place = turn.writer, turn.place.next
        new = await self._streams.open(place.stream)
        turn.place, turn.writer = place.behind(1), new
        try:
            await self._store.save(with_place(task, turn.place), context)
            await new.write(None)
        finally:
            try:
                await old.done()
            except LOST:
                new.end_soon(CANCELED)  # by somebody who could not know of this one
                raise
        for run in self._runs.values():
            if run.turn is turn:
                run.scope.cancel()

    def _drop(self, turn: Turn) -> None:
        if self._turns.get(turn.place.root) is turn:
            del self._turns[turn.place.root]

    def _give_up(self, turn: Turn) -> None:
        """End a turn of which nothing more can be stored now; that is stored in the background, as soon as it can be."""
        self._drop(turn)
        turn.writer.end_soon(STOPPED)

    # What the SDK asks of an event stream

    async def publish(self, task_id: str, event: VersionedEvent) -> None:  # noqa: ARG002 - it was stored before
        run = self._runs.get(task_id)
        if run is not None:
            run.queued -= 1
            await self._end_if_over(task_id, run)

    def subscribe(self, task_id: str, *, after: TaskVersion) -> AsyncGenerator[VersionedEvent, None]:
        raise NotImplementedError("StreamRequestHandler follows tasks by itself")

    async def destroy(self, task_id: str) -> None:
        pass

    # Runs

    async def begin_run(self, context: RequestContext) -> Run:
        """Note that an agent is about to run; of a task that there is, when no other turn of it is open anywhere."""
        task_id = id_of(context)
        run = Run()
        while (seen := await self.look(task_id, context.call_context)) is not None:
            if seen.has_ended:
                raise UnsupportedOperationError(message=f"Task {task_id} has ended")
            if seen.place is not None and (stale := self._turns.get(seen.place.root)) is not None:
                await self._end(stale)
            elif seen.is_open and seen.place is not None:
                await self._until_over(seen.place)
            elif (turn := await self._begin(seen.place, task_id)) is not None:
                attach(run, turn)
                context.current_task = seen.task
                break
        self._runs[task_id] = run
        return run

    def is_run_here(self, task_id: str) -> bool:
        """Say whether a task's agent runs in this process."""
        return task_id in self._runs

    async def is_run_elsewhere(self, task_id: str, context: ServerCallContext) -> bool:
        """Say whether it runs in another one."""
        seen = None if self.is_run_here(task_id) else await self.look(task_id, context)
        return seen is not None and seen.is_open

    async def end_run(self, context: RequestContext, run: Run, *, has_returned: bool) -> None:
        """Note that it has ended. If it was cancelled, or has failed, its turn ends with what the SDK stores of that, if it does."""
        run.is_over = True
        task_id = id_of(context)
        if has_returned:
            await self._end_if_over(task_id, run)
            self._look_after(task_id, run, run.queued + 1)
        else:
            self._forget(task_id, run)
            if run.turn is not None:
                self._end_if_left(run.turn, None)

    def _end_if_left(self, turn: Turn, place: Place | None) -> None:
        """Give a turn up when nobody stores how it has ended: the SDK does not if who asked it to cancel has gone meanwhile."""
        if self._turns.get(turn.place.root) is not turn:
            return
        if turn.place == place and not turn.lock.locked():
            self._give_up(turn)
        else:
            asyncio.get_running_loop().call_later(END_SECONDS, self._end_if_left, turn, turn.place)

    async def _end_if_over(self, task_id: str, run: Run) -> None:
        if not run.is_over or run.queued > 0:
            return
        self._forget(task_id, run)
        if run.turn is not None:
            try:
                await self._end(run.turn)
            except StreamkeepError as error:
                logger.warning("stream %s: the end of its turn could not be stored: %s", run.turn.place.stream, error)
            except Exception:  # the store's; what it has is behind by no event
                logger.exception("task %s: that its turn is over could not be stored", task_id)

    def _look_after(self, task_id: str, run: Run, queued: int) -> None:
        """Give a run up when its events are stored no more: the SDK has dropped them, after an error."""
        if run.ended.is_set():
            return
        if run.queued < queued or (run.turn is not None and run.turn.lock.locked()):
            asyncio.get_running_loop().call_later(END_SECONDS, self._look_after, task_id, run, run.queued)
            return
        self._forget(task_id, run)
        if run.turn is not None and self._turns.get(run.turn.place.root) is run.turn:
            self._give_up(run.turn)

    def _forget(self, task_id: str, run: Run) -> None:
        if self._runs.get(task_id) is run:
            del self._runs[task_id]
        run.ended.set()

    async def _end(self, turn: Turn) -> None:
        """End a turn whose agent has returned and whose task has not ended. The store says so before anybody can begin the next one."""
        async with turn.lock:
            if self._turns.get(turn.place.root) is not turn:
                return
            self._drop(turn)
            try:
                if turn.last is not None:
                    task, context = turn.last
                    await self._store.save(with_place(task, turn.place.next), context)
            finally:
                await self._end_writer(turn)

    async def _until_over(self, place: Place) -> None:
        try:
            async with self._streams.subscribe(place.stream, after(place.tail)) as events:
                async for _ in events:
                    pass
        except StreamNotFoundError:
            pass

    async def drained(self) -> None:
        """Return when no agent runs."""
        while self._runs:
            await next(iter(self._runs.values())).ended.wait()

    async def end_all(self) -> None:
        """Store of all tasks that are worked on here that they have failed."""
        for turn in list(self._turns.values()):
            self._drop(turn)
            try:
                await turn.writer.error(STOPPED)
                if turn.last is not None:
                    task, context = turn.last
                    await self.look(task.id, context)
            except LOST:
                pass
            except Exception:
                logger.exception("stream %s: that its task has failed could not be stored", turn.place.stream)

    # Reading

    async def look(self, task_id: str, context: ServerCallContext) -> Seen | None:
        """Give a task as it stands: what the store has, and what its streams have more. That its agent has died is stored.

        Raises StorageError: the store has not what was stored in it before an event that did not fit into a stream.
        """
        for pause in GAP_PAUSES:
            try:
                return await self._look(task_id, context)
            except _GapError:
                await anyio.sleep(pause)
        raise StorageError("the task store does not give back what was stored in it")

    async def _look(self, task_id: str, context: ServerCallContext) -> Seen | None:
        stored = await self._store.get(task_id, context)
        if stored is None:
            return None
        task = Task()
        task.CopyFrom(stored)
        place = take_place(task)
        if place is None or has_ended(task):
            return Seen(task, place)
        before = place
        while True:
            info = await self._info(place.stream)
            if info is not None:
                place = await self._caught_up(task, place, info)
                if info.status == "open":
                    return Seen(task, place, is_open=True)
            error = await self._error(task, place, before, info, context)
            if has_ended(task) or error is not None or (info is None and place.tail == 0):
                break
            place = place.next
        end_by(task, place, error)
        if error is not None or (place != before and has_ended(task)):
            await self._store.save(with_place(task, place), context)
        return Seen(task, place)

    async def _error(
        self, task: Task, place: Place, before: Place, info: StreamInfo | None, context: ServerCallContext
    ) -> str | None:
        """Give the error in which a task's turn has ended, whose stream is over or gone; None: none, as of one that waits for its user."""
        if task.status.state in INTERRUPTED_TASK_STATES and (info is None or info.error == STOPPED.status):
            return None  # its agent had nothing more to do than to return
        if info is not None:
            return info.error
        if place.tail == 0:
            return None
        if await self._has_gone_on(task.id, before, context):
            raise _GapError
        return "NOT_FOUND"

    async def _has_gone_on(self, task_id: str, place: Place, context: ServerCallContext) -> bool:
        """Say whether the store has another place of a task now: since that was read its stream may have ended, and been removed."""
        stored = await self._store.get(task_id, context)
        if stored is None:
            return True
        task = Task()
        task.CopyFrom(stored)
        return take_place(task) != place

    async def _info(self, stream: str) -> StreamInfo | None:
        try:
            return await self._streams.info(stream)
        except StreamNotFoundError:
            return None

    async def _caught_up(self, task: Task, place: Place, info: StreamInfo) -> Place:
        """Apply to a task what a stream has more. _GapError: it has less, as of an event that did not fit; then the store has all."""
        if info.tail <= place.tail:
            return place
        async with self._streams.subscribe(place.stream, after(place.tail), follow=False) as events:
            async for event in events:
                if event.offset >= info.tail:
                    break
                place = place.behind(1)
                if event.type is StreamEventType.ERROR:
                    continue
                update = event_of(event.data)
                if update is not None:
                    apply(task, update)
                elif event.type is StreamEventType.CHUNK:
                    raise _GapError
        return place

    async def follow(self, seen: Seen, context: ServerCallContext) -> AsyncGenerator[Event, None]:
        """Give a task, then each event behind that, until it has ended."""
        yield seen.task
        while not seen.has_ended:
            if seen.place is None:  # it was stored without us, and no stream says when it goes on
                again = await self._changed(seen, context)
                if again is None:
                    return
                seen = again
                yield seen.task
                continue
            async with aclosing(self._behind(seen.task.id, seen.place, context)) as events:
                async for event in events:
                    yield event
                    if has_ended(event):
                        return
            # There is a gap, or an error: what it has come to is given in place of what the client has.
            again = await self.look(seen.task.id, context)
            if again is None:
                return
            seen = again
            yield seen.task

    async def _changed(self, seen: Seen, context: ServerCallContext) -> Seen | None:
        """Give a task when it has changed; None: it is gone."""
        while True:
            await anyio.sleep(UNKNOWN_SECONDS)
            again = await self.look(seen.task.id, context)
            if again is None or again.task != seen.task:
                return again

    async def _behind(self, task_id: str, place: Place, context: ServerCallContext) -> AsyncGenerator[Event, None]:
        """Give each event behind a place, over all turns; return where there is a gap, or an error."""
        while await self._there(task_id, place, context):
            try:
                info = await self._streams.info(place.stream)
                async with self._streams.subscribe(place.stream, after(min(place.tail, info.tail))) as events:
                    async for event in events:
                        if event.type is StreamEventType.ERROR:
                            return
                        update = event_of(event.data)
                        if event.offset >= place.tail and update is not None:
                            yield update
                        elif event.offset >= place.tail and event.type is StreamEventType.CHUNK:
                            return
            except StreamNotFoundError:
                return
            place = place.next

    async def _there(self, task_id: str, place: Place, context: ServerCallContext) -> bool:
        """Wait for a turn to begin; False if it does not: the task has ended, or gone on elsewhere."""
        if await self._info(place.stream) is not None:
            return True
        async with self._streams.storage.watch(place.stream) as doorbell:
            while await self._info(place.stream) is None:
                seen = await self.look(task_id, context)
                if seen is None or seen.has_ended or seen.place != place:
                    return False
                with anyio.move_on_after(LOOK_SECONDS):
                    await doorbell.wait()
        return True


def attach(run: Run, turn: Turn) -> None:
    run.turn, turn.is_run = turn, True
    run.begun.set()


def id_of(context: RequestContext) -> str:
    assert context.task_id is not None
    return context.task_id


def after(tail: int) -> int | None:
    return tail - 1 if tail else None
