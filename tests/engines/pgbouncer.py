"""PgBouncer for tests, in transaction mode: each transaction in whatever session is free."""

import os
import tempfile
from pathlib import Path

from tests.engines.postgres import Postgres, give, somebody
from tests.engines.process import Process, answers, free_port


class PgBouncer(Process):
    """A pooler before a server. It has three sessions for all its clients."""

    def __init__(self, program: str, server: Postgres) -> None:
        self.port = free_port()
        user = somebody() if os.geteuid() == 0 else None
        directory = Path(tempfile.mkdtemp(prefix="streamkeep-pgbouncer-"))
        (directory / "users").write_text('"streamkeep" ""\n')
        (directory / "pgbouncer.ini").write_text(f"""
[databases]
* = host=127.0.0.1 port={server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = trust
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = 3
max_client_conn = 500
""")
        for path in (directory, *directory.iterdir()):
            give(path, user)
        super().__init__([program, directory / "pgbouncer.ini"], directory, lambda: answers(self.port), user=user)
