"""A2A's events and tasks as they are stored, and what events make of a task; pure. See `a2a`."""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from a2a.server.agent_execution.active_task import INTERRUPTED_TASK_STATES, TERMINAL_TASK_STATES
from a2a.server.events import Event
from a2a.server.tasks.task_manager import append_artifact_to_task
from a2a.types import (
    Message,
    Part,
    Role,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.utils.proto_utils import to_stream_response
from google.protobuf import json_format

from ..events import ErrorInfo

KEY: Final = "streamkeep"
"""What a task that is stored has in its metadata to say how far it goes; nobody is shown it."""
PLACE: Final = re.compile(r"(a2a~[0-9a-f]{32})/([0-9]{1,9})/([0-9]{1,16})")
UNREADABLE: Final = (json_format.Error, RecursionError)
"""What `record_of` raises of an event that is no JSON, or that could not be read back: one that is nested too deeply."""
STOPPED: Final = ErrorInfo("ABORTED", "the agent was stopped before the task had ended")
CANCELED: Final = ErrorInfo("CANCELLED", "the task was canceled")
MESSAGES: Final = {
    "ABORTED": STOPPED.message,
    "NOT_FOUND": "nothing is known of the agent's run any more",
}


@dataclass(frozen=True, slots=True)
class Place:
    """How far into its streams a task goes: so many events into the stream of a turn."""

    root: str
    turn: int
    tail: int

    @property
    def stream(self) -> str:
        return f"{self.root}.{self.turn}"

    @property
    def next(self) -> "Place":
        """The beginning of the next turn."""
        return Place(self.root, self.turn + 1, 0)

    def behind(self, events: int) -> "Place":
        return Place(self.root, self.turn, self.tail + events)


def has_ended(event: Event) -> bool:
    return isinstance(event, Task | TaskStatusUpdateEvent) and event.status.state in TERMINAL_TASK_STATES


def with_place(task: Task, place: Place) -> Task:
    """Give a copy of a task that says how far it goes, whatever it has said before."""
    stored = Task()
    stored.CopyFrom(task)
    stored.metadata[KEY] = f"{place.root}/{place.turn}/{place.tail}"
    return stored


def take_place(task: Task) -> Place | None:
    """Take out of a stored task how far it goes."""
    found = PLACE.fullmatch(str(task.metadata[KEY])) if KEY in task.metadata else None
    if found is None:
        return None
    del task.metadata[KEY]
    if not task.metadata:
        task.ClearField("metadata")
    return Place(found[1], int(found[2]), int(found[3]))


def first_place(task: Task) -> Place:
    """Give where the streams of a task begin that was stored without us: the same in each process that finds it so."""
    known = json.dumps([task.id, task.context_id])
    return Place(f"a2a~{hashlib.sha256(known.encode()).hexdigest()[:32]}", 0, 0)


def record_of(event: Event) -> dict[str, Any]:
    """Give what is stored of an event, and can be read back; else `UNREADABLE` is raised."""
    encoded: dict[str, Any] = json_format.MessageToDict(to_stream_response(event))
    json_format.ParseDict(encoded, StreamResponse())
    return encoded


def event_of(data: bytes) -> Event | None:
    """Give an event as it was stored; None: this is none."""
    stored = json.loads(data)
    if stored is None:
        return None
    response = json_format.ParseDict(stored, StreamResponse())
    event: Event = getattr(response, response.WhichOneof("payload") or "task")
    return event


def apply(task: Task, event: Event) -> None:
    """Change a task as the SDK does by an event."""
    match event:
        case Task():
            task.CopyFrom(event)
        case TaskStatusUpdateEvent():
            set_status(task, event.status)
            task.metadata.MergeFrom(event.metadata)
        case TaskArtifactUpdateEvent():
            append_artifact_to_task(task, event)
        case _:
            pass


def end_by(task: Task, place: Place, error: str | None) -> None:
    """End a task whose turn has ended in an error, if it has. One that waits for its user goes on waiting, unless it was canceled."""
    if error == "CANCELLED":
        set_status(task, status_of(TaskState.TASK_STATE_CANCELED, place, CANCELED.message))
    elif error is not None and task.status.state not in INTERRUPTED_TASK_STATES:
        set_status(task, status_of(TaskState.TASK_STATE_FAILED, place, MESSAGES.get(error, STOPPED.message)))


def set_status(task: Task, status: TaskStatus) -> None:
    if task.status.HasField("message"):
        task.history.append(task.status.message)
    task.status.CopyFrom(status)


def status_event(task_id: str | None, context_id: str | None, state: TaskState) -> TaskStatusUpdateEvent:
    """Give the event by which a task comes into a state now."""
    status = TaskStatus(state=state)
    status.timestamp.FromDatetime(datetime.now(UTC))
    return TaskStatusUpdateEvent(task_id=task_id, context_id=context_id, status=status)


def status_of(state: TaskState, place: Place, text: str) -> TaskStatus:
    # Who looks at it next gives it the same id; the stream's own is nobody's to know.
    message_id = uuid.uuid5(uuid.NAMESPACE_OID, place.stream)
    message = Message(message_id=str(message_id), role=Role.ROLE_AGENT, parts=[Part(text=text)])
    status = TaskStatus(state=state, message=message)
    status.timestamp.FromDatetime(datetime.now(UTC))
    return status
