"""The app's tasks and the streams of their turns, as the store and the event stream that the SDK asks. See `a2a`."""

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final

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
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import UnsupportedOperationError

from .._info import StreamInfo
from .._input import StreamInput
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    LimitExceededError,
    StorageError,
    StreamAlreadyExistsError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from ..events import StreamEvent, StreamEventType
from ._a2a_events import (
    CANCELED,
    STOPPED,
    UNREADABLE,
    Place,
    apply,
    end_by,
    event_of,
    first_place,
    has_ended,
    record_of,
    status_event,
    take_place,
    with_place,
)

logger: Final = logging.getLogger("streamkeep")
LOST: Final = (StreamCompletedError, StreamTakenOverError, StreamNotFoundError, StreamInputClosedError)
UNFIT: Final = (LimitExceededError, InvalidArgumentError, *UNREADABLE)
LOOK_SECONDS: Final = 30.0
"""How often who waits for a task's next turn looks at the task itself."""
END_SECONDS: Final = 10.0
"""How long the ends of all tasks may take to be stored when the handler is left, and an agent's own `cancel` when another process asks."""
ASK_SECONDS: Final = 3.0
"""How long who cancels a task in another process waits for its agent to end it, before ending it in the agent's place."""
GAP_PAUSES: Final = (0.1, 0.3, 1.0)
"""When to read a store again that does not have what was stored in it. After that, a task is given without."""
RETRY_SECONDS: Final = 1.0
"""How long after a store has failed it is first asked again."""

Push = Callable[[str, TaskStatusUpdateEvent], Awaitable[None]]


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
        place: what it has in it. Between two turns, the beginning of the next one.
        kept: what the store has of it; None: it was stored without us.
        is_open: whether that turn is open: its agent runs somewhere.
        has_gap: whether it lacks an event, which did not fit into a stream: that is only in the store.
        is_news: whether it has ended, and the store does not have that.
    """

    task: Task
    place: Place
    kept: Place | None
    is_open: bool = False
    has_gap: bool = False
    is_news: bool = False

    @property
    def has_ended(self) -> bool:
        return has_ended(self.task)


@dataclass(eq=False, slots=True)
class Turn:
    """A turn that is written here.

    Attributes:
        place: how far it has come.
        seen: how far the SDK knows of it; what it was told has failed may be stored all the same.
        is_run: an agent runs, and more will come; else it ends with its first event.
        last: the task as its last event has left it, and for whom it is stored.
    """

    place: Place
    seen: Place
    writer: StreamInput
    last: tuple[Task, ServerCallContext]
    is_run: bool = False
    lock: anyio.Lock = field(default_factory=anyio.Lock)


@dataclass(eq=False, slots=True)
class Run:
    """An agent that runs here.

    Attributes:
        turn: what it writes; None before its first event.
        queued: how many of its events the SDK has not stored yet.
        has_said_end: whether one of those has ended the task.
        is_over: whether it has returned.
        scope: cancelled when its turn goes on in another stream.
    """

    turn: Turn | None = None
    queued: int = 0
    has_said_end: bool = False
    is_over: bool = False
    begun: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class Tasks(VersionedTaskStore, TaskEventStream):
    """The app's tasks, and the streams of their turns.

    An event is stored in the turn's stream, then the task in the app's store. So a stored task may be behind, never ahead: who looks at it
    applies what its stream has more.

    While a turn's stream is open, its writer alone stores the task. It ends the stream when the store has all of the turn, so that whoever
    is next finds that there.
    """

    def __init__(self, streams: StreamManager, store: TaskStore, push: Push | None = None) -> None:
        self._streams = streams
        self._store = store
        self._push = push
        self._turns: dict[str, Turn] = {}  # by root
        self._runs: dict[str, Run] = {}  # by task
        self._waiting: Counter[str] = Counter()  # messages that wait for their turn, by task
        self._unstored: set[Turn] = set()  # turns that are over, and not in the store yet
        self._retries: set[asyncio.Task[None]] = set()

    # What the SDK asks of a store

    async def get(self, task_id: str, context: ServerCallContext) -> StoredTask | None:
        seen = await self.look(task_id, context)
        return None if seen is None else StoredTask(seen.task, Version(seen.place))

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
        turn = None if place is None else self._turns.get(place.root)
        if turn is None and is_cancel:
            return Version((await self.cancel(task.id, context)).place)
        if turn is None:
            turn = await self._begin_at(task, place, context)
        async with turn.lock:
            if not is_cancel and place is not None and place != turn.seen:
                raise ConcurrentTaskModificationError(task.id)
            return await self._write(turn, task, event, context)

    async def _begin_at(self, task: Task, place: Place | None, context: ServerCallContext) -> Turn:
        """Begin a turn behind what was seen of a task, if nothing has come since. None was seen of a new one."""
        if place is None:
            first = Place(f"a2a~{uuid.uuid4().hex}", 0, 0)
            turn = self._turns[first.root] = Turn(first, first, await self._streams.open(first.stream), (task, context))
        else:
            seen = await self.look(task.id, context)
            if seen is None or seen.has_ended or seen.is_open or seen.place != place:
                raise ConcurrentTaskModificationError(task.id)
            begun = await self._begin(task.id, place, context)
            if begun is None:
                raise ConcurrentTaskModificationError(task.id)
            turn = begun
        run = self._runs.get(task.id)
        if run is not None and run.turn is None:
            attach(run, turn)
        return turn

    async def cancel(self, task_id: str, context: ServerCallContext) -> Seen:
        """Cancel a task that does not run here, and give it. Concurrent…Error: there is none, or it has ended already."""
        while (seen := await self.look(task_id, context)) is not None and not seen.has_ended:
            if seen.is_open:
                await self._stop(seen.place)
                seen = await self.look(task_id, context)
                if seen is not None and seen.task.status.state == TaskState.TASK_STATE_CANCELED:
                    return seen
            elif (turn := await self._begin(task_id, seen.place, context)) is not None:
                task, _ = turn.last
                event = status_event(task.id, task.context_id, TaskState.TASK_STATE_CANCELED)
                apply(task, event)
                async with turn.lock:
                    await self._write(turn, task, event, context)
                await self.tell(task, turn.place)
                return Seen(task, turn.place, turn.place)
        raise ConcurrentTaskModificationError(task_id)

    async def _stop(self, place: Place) -> None:
        """End a turn: ask its agent to, and do it in the agent's place if that takes too long."""
        with anyio.move_on_after(ASK_SECONDS):
            await self._mark(stop_of(place))
            await self._until_over(place)
            return
        with suppress(StreamNotFoundError):
            await self._streams.cancel(place.stream)

    async def _mark(self, stream: str) -> bool:
        """Make an empty stream, for its id to be there; False: it is."""
        try:
            async with self._streams.open(stream) as mark:
                await mark.done()
        except StreamAlreadyExistsError:
            return False
        return True

    async def _begin(self, task_id: str, place: Place, context: ServerCallContext) -> Turn | None:
        """Begin a turn behind what was seen of a task; None: somebody else has, or something has come since."""
        try:
            writer = await self._streams.open(place.stream)
        except StreamAlreadyExistsError:
            return None
        turn: Turn | None = None
        try:
            # Only now is it ours to store. That it was free may have been read long ago: its stream may have come, and been removed.
            seen = await self.look(task_id, context)
            if seen is not None and seen.place == place and not seen.has_ended:
                if seen.kept != place:
                    await self._store.save(with_place(seen.task, place), context)
                turn = self._turns[place.root] = Turn(place, place, writer, (seen.task, context))
        finally:
            if turn is None:
                with anyio.move_on_after(END_SECONDS, shield=True), suppress(*LOST):
                    await writer.done()
        return turn

    async def _write(self, turn: Turn, task: Task, event: Event | None, context: ServerCallContext) -> TaskVersion:
        """Store an event, then the task with it. Concurrent…Error: the turn is somebody else's, or was ended by one."""
        is_stored = False
        try:
            try:
                await turn.writer.write(record_of(task if event is None else event))
                turn.place = turn.place.behind(1)
            except UNFIT:
                await self._go_on_in_another(turn, task, context)
                is_stored = True
        except LOST:
            self._drop(turn)
            raise ConcurrentTaskModificationError(task.id) from None
        except BaseException as error:
            if isinstance(error, StorageError) or not turn.is_run:
                self._give_up(turn)
            raise
        turn.last = with_place(task, turn.place), context
        if has_ended(task) or not turn.is_run:
            await self._finish(turn)
        elif not is_stored:
            await self._store.save(*turn.last)
        if turn.writer.cancelled.is_set() and not has_ended(task):
            # Somebody else has ended it, and may have stored that before this.
            await self.look(task.id, context)
        turn.seen = turn.place
        return Version(turn.place)

    async def _go_on_in_another(self, turn: Turn, task: Task, context: ServerCallContext) -> None:
        """Go on behind an event that does not fit into the stream. Who follows is told to look at the task, so that is stored first."""
        old, place = turn.writer, turn.place.next
        new = await self._streams.open(place.stream)
        turn.place, turn.writer = place.behind(1), new
        for run in self._runs.values():
            if run.turn is turn:
                run.scope.cancel()
        try:
            await self._store.save(with_place(task, turn.place), context)
        finally:
            try:
                await new.write(None)
            finally:
                try:
                    await old.done()
                except LOST:
                    await new.error(CANCELED)  # by somebody who could not know of this one
                    raise

    async def _finish(self, turn: Turn) -> None:
        """End a turn that is over. A store that fails is asked again, in the background; a task that has ended has, all the same."""
        self._drop(turn)
        self._unstored.add(turn)
        try:
            await self._hand_over(turn)
        except BaseException as error:
            if turn in self._unstored:
                retry = asyncio.create_task(self._hand_over_later(turn))
                self._retries.add(retry)
                retry.add_done_callback(self._retries.discard)
            task, _ = turn.last
            if not isinstance(error, Exception) or not has_ended(task):
                raise
            logger.warning("task %s: that it has ended is not in the store yet, which fails: %r", task.id, error)

    async def _hand_over(self, turn: Turn) -> None:
        """Store a task as a turn has left it, then end the turn's stream: from then on the task is somebody else's to store."""
        (task, context), place = turn.last, turn.place
        await self._store.save(with_place(task, place.next), context)
        self._unstored.discard(turn)
        turn.place = place.next
        try:
            await turn.writer.done()
        except LOST:
            if not has_ended(task):  # somebody has ended it meanwhile, and may have stored that before this
                await self._store.save(with_place(task, place), context)
                await self.look(task.id, context)
        except StreamkeepError as error:
            logger.warning("stream %s: the end of its turn could not be stored: %s", turn.writer.id, error)

    async def _hand_over_later(self, turn: Turn) -> None:
        seconds = RETRY_SECONDS
        while turn in self._unstored:
            await anyio.sleep(seconds)
            seconds = min(2 * seconds, LOOK_SECONDS)
            try:
                with anyio.fail_after(END_SECONDS):
                    await self._hand_over(turn)
            except Exception as error:
                logger.warning("task %s: the store still fails: %r", turn.last[0].id, error)

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
        self._waiting[task_id] += 1
        try:
            turn = await self._next_turn(task_id, context.call_context)
        finally:
            self._waiting -= Counter([task_id])
        if turn is not None:
            attach(run, turn)
            context.current_task = Task()
            context.current_task.CopyFrom(turn.last[0])
        self._runs[task_id] = run
        return run

    async def _next_turn(self, task_id: str, context: ServerCallContext) -> Turn | None:
        """Wait until a task is worked on nowhere, and begin its next turn; None: there is no such task."""
        while (seen := await self.look(task_id, context)) is not None:
            if seen.has_ended:
                raise UnsupportedOperationError(message=f"Task {task_id} has ended")
            if (stale := self._turns.get(seen.place.root)) is not None:
                await self._end(stale)
            elif seen.is_open:
                await self._until_over(seen.place)
            elif (turn := await self._begin(task_id, seen.place, context)) is not None:
                return turn
        return None

    def run_of(self, task_id: str) -> Run | None:
        """Give the agent that runs here for a task."""
        return self._runs.get(task_id)

    async def is_elsewhere(self, task_id: str, context: ServerCallContext) -> bool:
        """Say whether a task's agent runs in another process, or a message waits here for its turn: nothing of it runs here."""
        if task_id in self._runs:
            return False
        seen = await self.look(task_id, context)
        if seen is None or seen.has_ended or seen.place.root in self._turns:
            return False
        return seen.is_open or task_id in self._waiting

    async def until_cancelled(self, run: Run) -> None:
        """Return when somebody else has ended a run's turn, or asks it to end."""
        await run.begun.wait()
        while (turn := run.turn) is not None:
            with anyio.CancelScope() as run.scope:
                async with anyio.create_task_group() as either:
                    either.start_soon(self._until_asked, stop_of(turn.place), either.cancel_scope)
                    await turn.writer.cancelled.wait()
                    either.cancel_scope.cancel()
                return

    async def _until_asked(self, stop: str, scope: anyio.CancelScope) -> None:
        try:
            await self._until_there(stop)
        except StreamkeepError as error:
            logger.warning("stream %s: whether it is asked for cannot be read: %s", stop, error)
        else:
            scope.cancel()

    async def _until_there(self, stream: str) -> None:
        async with self._streams.storage.watch(stream) as doorbell:
            while await self._info(stream) is None:
                with anyio.move_on_after(LOOK_SECONDS):
                    await doorbell.wait()

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
        """End a turn whose agent has returned and whose task has not ended."""
        async with turn.lock:
            if self._turns.get(turn.place.root) is not turn:
                return
            task, _ = turn.last
            if turn.place.tail == 0 or task.status.state not in INTERRUPTED_TASK_STATES:
                await self._finish(turn)
                return
            # Of a task that waits for its user the store says enough: it is gone on with whether this stream is there or not.
            self._drop(turn)
            with suppress(*LOST):
                await turn.writer.done()

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
        if retries := list(self._retries):
            for retry in retries:
                retry.cancel()
            await asyncio.wait(retries)
        for turn in [*self._unstored, *self._turns.values()]:
            task, context = turn.last
            try:
                if turn in self._unstored:
                    await self._hand_over(turn)
                else:
                    self._drop(turn)
                    await turn.writer.error(STOPPED)
                    await self.look(task.id, context)
            except LOST:
                pass
            except Exception:
                logger.exception("task %s: how it has ended could not be stored", task.id)
            finally:
                turn.writer.end_soon(STOPPED)

    # Reading

    async def look(self, task_id: str, context: ServerCallContext) -> Seen | None:
        """Give a task as it stands: what the store has, and what its streams have more. An end that only the streams have is stored."""
        stored, pauses = await self._stored(task_id, context), iter(GAP_PAUSES)
        while stored is not None:
            seen = await self._caught_up(stored)
            if not seen.has_gap and not seen.is_news:
                return seen
            # This hangs on what the store had before the streams were read. It may have more now.
            again = await self._stored(task_id, context)
            while seen.has_gap and again == stored and (pause := next(pauses, None)) is not None:
                await anyio.sleep(pause)
                again = await self._stored(task_id, context)
            if again == stored:
                if seen.is_news and not seen.has_gap:
                    await self._store.save(with_place(seen.task, seen.place), context)
                    await self.tell(seen.task, seen.place)
                return seen
            stored = again
        return None

    async def _stored(self, task_id: str, context: ServerCallContext) -> Seen | None:
        """Give a task as the store has it."""
        stored = await self._store.get(task_id, context)
        if stored is None:
            return None
        task = Task()
        task.CopyFrom(stored)
        kept = take_place(task)
        return Seen(task, kept or first_place(task), kept)

    async def _caught_up(self, stored: Seen) -> Seen:
        """Give a stored task with what its streams have more."""
        task, place, has_gap = Task(), stored.place, False
        task.CopyFrom(stored.task)
        while not has_ended(task):
            info = await self._info(place.stream)
            if info is None and place.tail == 0:
                break
            error: str | None = "NOT_FOUND"
            if info is not None:
                try:
                    records = await self._records(place, info)
                except StreamNotFoundError:
                    continue
                for record in records:
                    update = None if record.type is StreamEventType.ERROR else event_of(record.data)
                    if update is not None:
                        apply(task, update)
                    has_gap |= update is None and record.type is StreamEventType.CHUNK
                place, error = place.behind(len(records)), info.error
                if info.status == "open":
                    return Seen(task, place, stored.kept, is_open=True, has_gap=has_gap)
            if not has_ended(task):
                end_by(task, place, error)
                place = place if has_ended(task) else place.next
        return Seen(task, place, stored.kept, has_gap=has_gap, is_news=has_ended(task) and not stored.has_ended)

    async def tell(self, task: Task, place: Place) -> None:
        """Push that a task has ended, where the SDK does not: once, whoever stores it."""
        if self._push is None or not await self._mark(f"{place.stream}.end"):
            return
        event = TaskStatusUpdateEvent(task_id=task.id, context_id=task.context_id, status=task.status)
        try:
            with anyio.fail_after(END_SECONDS):
                await self._push(task.id, event)
        except Exception:
            logger.exception("task %s: that it has ended could not be pushed", task.id)

    async def _info(self, stream: str) -> StreamInfo | None:
        try:
            return await self._streams.info(stream)
        except StreamNotFoundError:
            return None

    async def _records(self, place: Place, info: StreamInfo) -> Sequence[StreamEvent[Any]]:
        """Give what a stream has behind a place."""
        if info.tail <= place.tail:
            return []
        async with self._streams.subscribe(place.stream, after(place.tail), follow=False) as events:
            return [event async for event in events if event.offset < info.tail]

    async def follow(self, seen: Seen, context: ServerCallContext) -> AsyncGenerator[Event, None]:
        """Give a task, then each event behind that, until it has ended."""
        yield seen.task
        while not seen.has_ended:
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


def stop_of(place: Place) -> str:
    """Give the id of the stream that is there when a turn was asked to end."""
    return f"{place.stream}.stop"


def id_of(context: RequestContext) -> str:
    assert context.task_id is not None
    return context.task_id


def after(tail: int) -> int | None:
    return tail - 1 if tail else None
