"""nats-py's client, where it takes too much on trust, what answers at `tls://` and what is in a credentials file; or too much time."""

import re
from pathlib import Path
from typing import Final

from nats.aio.client import Client, RawCredentials
from nats.errors import SecureConnRequiredError

from streamkeep.errors import StorageError

_CREDENTIALS: Final = re.compile(
    rb"BEGIN NATS USER JWT-+\s+(\w[\w-]*\.[\w-]+\.[\w-]+)\s.*BEGIN USER NKEY SEED-+\s+(SUA[A-Z2-7]{55})\s", re.DOTALL
)


class InsistingClient(Client):
    """Says who we are only over TLS, if the URL is `tls://`. Else whether there is TLS would be up to whoever answers."""

    def _connect_command(self) -> bytes:
        is_wanted = self._current_server is not None and self._current_server.uri.scheme == "tls"
        if is_wanted and not self._server_info.get("tls_required"):
            raise SecureConnRequiredError
        return super()._connect_command()

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """Do what nats-py's does, which looks at each character by itself: half of the time that a doorbell takes."""
        lines = (line.partition(b":") for line in raw.split(b"\r\n"))
        return {
            name.strip().decode("ascii", "replace"): value.strip().decode("utf-8", "replace")
            for name, colon, value in lines
            if colon
        }


def credentials_in(path: Path) -> RawCredentials:
    """Read a credentials file. StorageError, which repeats nothing of it: it cannot be read, or is none.

    nats-py looks for it only when a server asks for what is in it, and never stops reading one without a token.
    """
    try:
        found = _CREDENTIALS.search(path.read_bytes())
    except OSError as error:
        raise StorageError(f"the credentials file cannot be read: {error}") from error
    if found is None:
        raise StorageError(
            f"{path} is no credentials file: it holds a user's token and seed, as 'nsc generate creds' writes them"
        )
    token, seed = (part.decode() for part in found.groups())
    return RawCredentials(f"-----BEGIN NATS USER JWT-----\n{token}\n-----BEGIN USER NKEY SEED-----\n{seed}\n")
