"""What a forked child gets of its parent's connections: nothing.

Parent and child share each socket, and the epoll instance of the parent's event loop. A child that only collects garbage, or exits, would
otherwise run the clean-up of inherited objects: take the parent's sockets out of that epoll, or end its sessions over them.
"""

import os
from typing import Final, Protocol
from weakref import WeakKeyDictionary


class Socket(Protocol):
    """What a transport of asyncio's gives as its socket."""

    def fileno(self) -> int:
        """Give its file descriptor, or -1 when it is closed."""
        ...


_sockets: Final[WeakKeyDictionary[object, Socket]] = WeakKeyDictionary()


def keep_from_children(owner: object, socket: Socket) -> None:
    """In every child that is forked from now on, as long as `owner` lives, let the socket's descriptor lead nowhere."""
    _sockets[owner] = socket


def _disconnect_child() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for socket in _sockets.values():
            if (descriptor := socket.fileno()) >= 0:
                os.dup2(nowhere, descriptor, inheritable=False)  # not closed: its number must not become another file's
    finally:
        os.close(nowhere)
    _sockets.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_disconnect_child)
