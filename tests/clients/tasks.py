"""What the tests of A2A have: what an agent says, and a store of tasks for several processes, as an app may have one.

The SDK's own wants packages for its database.
"""

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Final

from a2a.server.context import ServerCallContext
from a2a.server.tasks import TaskStore
from a2a.types import ListTasksRequest, ListTasksResponse, Task

SAID: Final = ("Nothing ", "is ", "lost, ", "not even é.")
"""What an agent says. A separator of lines in it, and the client takes it for the end of an event: see `test_a2a`."""


class FileTaskStore(TaskStore):
    """Tasks in a file of SQLite, each of them its owner's."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def save(self, task: Task, context: ServerCallContext) -> None:
        with self._open() as file:
            row = (context.user.user_name, task.id, task.SerializeToString())
            file.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", row)

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        with self._open() as file:
            rows = file.execute("SELECT task FROM tasks WHERE owner = ? AND id = ?", (context.user.user_name, task_id))
            found = rows.fetchone()
        return None if found is None else Task.FromString(found[0])

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        with self._open() as file:
            rows = file.execute("SELECT task FROM tasks WHERE owner = ? ORDER BY id", (context.user.user_name,)).fetchall()
        return ListTasksResponse(tasks=[Task.FromString(task) for (task,) in rows])

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        with self._open() as file:
            file.execute("DELETE FROM tasks WHERE owner = ? AND id = ?", (context.user.user_name, task_id))

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=10)) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS tasks (owner TEXT, id TEXT, task BLOB, PRIMARY KEY (owner, id))")
            yield file
