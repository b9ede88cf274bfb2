"""Who may speak with whom: NATS servers that show a certificate."""

import subprocess
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import pytest
from tests.engines.nats import NATSServer, running_server

from streamkeep.errors import InvalidArgumentError, StorageError, StorageUnavailableError
from streamkeep.storage import Head
from streamkeep.storages import storage_for
from streamkeep.storages.nats import NATSStorage


async def use(url: str) -> None:
    async with storage_for(url) as storage:
        head = Head(time.time_ns() // 1000, 0, b"state", 4e9)
        assert await storage.commit("s", None, head)
        assert await storage.delete("s", head.version)


async def refused(url: str) -> str:
    """Give the sentence with which a URL is refused for good, after a look at all that a traceback would show."""
    with pytest.raises(StorageError) as raised:
        await use(url)
    assert not isinstance(raised.value, StorageUnavailableError)
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


# -- TLS


USERS: Final = "authorization { user: alice, password: s3cret }\n"


def tls_of(directory: Path) -> str:
    return f'tls {{ cert_file: "{directory}/server.pem", key_file: "{directory}/server.key" }}\n'


class TestTLS:
    """`localhost` is what the certificate says, 127.0.0.1 is not."""

    @pytest.fixture(scope="class")
    @classmethod
    def authority(cls, requires: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Give a directory with `ca.pem`, and the certificate `server.pem` that it has signed."""
        directory = tmp_path_factory.mktemp("authority")
        openssl = [requires("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]
        for name, more in (("ca", ["-subj", "/CN=CA"]), ("server", ["-subj", "/CN=server", *signed])):
            command = [*openssl, *more, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
            subprocess.run(command, check=True, capture_output=True, cwd=directory)
        return directory

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, authority: Path) -> Generator[NATSServer]:
        with running_server(more=tls_of(authority) + USERS) as server:
            yield server

    @pytest.fixture(autouse=True)
    def trusted(self, authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))

    @pytest.mark.parametrize("scheme", ["tls", "nats"])
    async def test_a_server_whose_authority_is_named_is_trusted(self, server: NATSServer, scheme: str) -> None:
        await use(f"{scheme}://alice:s3cret@localhost:{server.port}")
        assert server.ask("varz")["tls_required"]

    @pytest.mark.parametrize("scheme", ["tls", "nats"])
    async def test_one_whose_authority_is_not_is_refused_with_advice(
        self, server: NATSServer, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SSL_CERT_FILE")
        sentence = await refused(f"{scheme}://alice:s3cret@localhost:{server.port}")
        assert "SSL_CERT_FILE names the CA to trust" in sentence

    @pytest.mark.parametrize("scheme", ["tls", "nats"])
    async def test_a_certificate_of_another_host_is_refused(self, server: NATSServer, scheme: str) -> None:
        sentence = await refused(f"{scheme}://alice:s3cret@127.0.0.1:{server.port}")
        assert "'127.0.0.1'" in sentence
        assert "name the host as its certificate does" in sentence

    @pytest.mark.parametrize("has_tls", [False, True], ids=["without TLS", "that does not insist on it"])
    async def test_nothing_is_said_in_the_clear_where_the_url_says_tls(self, authority: Path, *, has_tls: bool) -> None:
        more = f"{tls_of(authority)}allow_non_tls: true\n" if has_tls else ""
        with running_server(more=f"{more}{USERS}debug: true\ntrace: true\n") as server:
            sentence = await refused(f"tls://alice:s3cret@localhost:{server.port}")
            assert "does not ask for TLS" in sentence
            assert "CONNECT" not in server.process.log
            await use(f"nats://alice:s3cret@localhost:{server.port}")
            assert "CONNECT" in server.process.log


def test_a_password_in_a_list_of_servers_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidArgumentError, match="arguments of their own") as raised:
        NATSStorage(["nats://localhost", "nats://alice:s3cret@localhost"])
    assert "s3cret" not in str(raised.value)
