"""nats-py's client, where it takes too much on trust: what answers at `tls://`."""

from nats.aio.client import Client
from nats.errors import SecureConnRequiredError


class InsistingClient(Client):
    """Says who we are only over TLS, if the URL is `tls://`. Else whether there is TLS would be up to whoever answers."""

    def _connect_command(self) -> bytes:
        is_wanted = self._current_server is not None and self._current_server.uri.scheme == "tls"
        if is_wanted and not self._server_info.get("tls_required"):
            raise SecureConnRequiredError
        return super()._connect_command()
