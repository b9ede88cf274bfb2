"""Who may speak with whom: NATS servers that show a certificate, and accounts whose users have credentials files."""

import asyncio
import json
import os
import subprocess
import time
import traceback
from base64 import urlsafe_b64encode
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

import nkeys  # type: ignore[import-untyped]  # it has no types
import pytest
import uvloop
from tests.engines.nats import NATSServer, running_server

from streamkeep.errors import InvalidArgumentError, StorageError, StorageUnavailableError
from streamkeep.storage import Head
from streamkeep.storages import storage_for
from streamkeep.storages.nats import NATSStorage
from streamkeep.storages.retrying import RetryingStorage


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
    def test_and_so_it_is_by_uvloop(self, server: NATSServer, scheme: str) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(use(f"{scheme}://alice:s3cret@localhost:{server.port}"))

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

    async def test_a_learned_server_whose_certificate_is_of_another_host_is_no_verdict(
        self, authority: Path, server: NATSServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Servers announce addresses, which their certificates seldom bear. It is as if the others were away, too."""
        monkeypatch.setattr("streamkeep.storages.nats._link._ANSWER_SECONDS", 1.0)
        with running_server(more=tls_of(authority)) as named:
            nats = NATSStorage([f"tls://localhost:{named.port}"])
            async with RetryingStorage(nats, timeout=timedelta(seconds=3)) as storage:
                nats._open._link._peers = [f"tls://127.0.0.1:{server.port}"]
                named.kill()
                with pytest.raises(StorageUnavailableError, match=f"localhost:{named.port}"):
                    await storage.read("s")


def test_a_password_in_a_list_of_servers_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidArgumentError, match="arguments of their own") as raised:
        NATSStorage(["nats://localhost", "nats://alice:s3cret@localhost"])
    assert "s3cret" not in str(raised.value)


# -- credentials files


class Key:
    """A key of an operator, an account or a user, which signs JSON Web Tokens as NATS wants them."""

    def __init__(self, prefix: int) -> None:
        self.seed: Final[str] = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self._pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.name: Final = bytes(self._pair.public_key).decode()

    def sign(self, subject: "Key", kind: str, *, limits: Mapping[str, object] | None = None, seconds: int = 3600) -> str:
        now = int(time.time())
        claims = {"jti": subject.name, "iat": now, "exp": now + seconds, "iss": self.name, "sub": subject.name}
        of_nats = {"type": kind, "version": 2, **(limits or {})}
        parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, {**claims, "nats": of_nats}]
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_encoded(self._pair.sign(signed.encode()))}"


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def a_user(account: Key, *, seconds: int = 3600) -> tuple[str, str]:
    """Give the token and the seed of a new user."""
    user = Key(nkeys.PREFIX_BYTE_USER)
    return account.sign(user, "user", limits={"subs": -1, "data": -1, "payload": -1}, seconds=seconds), user.seed


def a_file(token: str, seed: str) -> str:
    """Give what `nsc generate creds` writes."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n"
        "NKEY Seed printed below can be used to sign and prove identity.\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n\n"
    )


class TestCredentials:
    """A server in operator mode, which knows an account with JetStream and one without."""

    @pytest.fixture(scope="class")
    @classmethod
    def accounts(cls) -> Mapping[str, Key]:
        return {name: Key(nkeys.PREFIX_BYTE_ACCOUNT) for name in ("streaming", "plain", "system", "unknown")}

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, accounts: Mapping[str, Key]) -> Generator[NATSServer]:
        operator = Key(nkeys.PREFIX_BYTE_OPERATOR)
        unlimited = dict.fromkeys(("subs", "data", "payload", "conn", "imports", "exports", "leaf"), -1)
        storing = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        limits = {"streaming": {**unlimited, **storing}, "plain": unlimited, "system": unlimited}
        preload = "\n".join(
            f"  {accounts[name].name}: {operator.sign(accounts[name], 'account', limits={'limits': limit})}"
            for name, limit in limits.items()
        )
        trusted = f"operator: {operator.sign(operator, 'operator')}\nsystem_account: {accounts['system'].name}\n"
        with running_server(more=f"{trusted}resolver: MEMORY\nresolver_preload {{\n{preload}\n}}\n") as server:
            yield server

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "user.creds"

    @pytest.fixture
    def url(self, server: NATSServer, file: Path) -> str:
        return f"nats://127.0.0.1:{server.port}?creds={file}"

    @pytest.fixture
    def write(self, file: Path) -> Callable[[str], object]:
        return lambda content: file.write_text(content, newline="")

    @pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
    async def test_a_user_of_the_account_is_let_in(
        self, accounts: Mapping[str, Key], url: str, write: Callable[[str], object], newline: str
    ) -> None:
        write(a_file(*a_user(accounts["streaming"])).replace("\n", newline))
        await use(url)

    async def test_the_file_is_read_again_when_the_connection_was_lost(
        self, accounts: Mapping[str, Key], server: NATSServer, url: str, write: Callable[[str], object]
    ) -> None:
        users = [a_user(accounts["streaming"]) for _ in range(2)]
        write(a_file(*users[0]))
        async with storage_for(url) as storage:
            write(a_file(*users[1]))
            assert isinstance(storage, RetryingStorage)
            assert isinstance(storage.storage, NATSStorage)
            connection = storage.storage._open._link._connection
            assert connection is not None
            connection.fail()
            assert await storage.read("s") is None
            (seen,) = server.ask("connz?auth=true")["connections"]
            assert seen["jwt"] == users[1][0]

    async def test_without_one_nobody_is(self, server: NATSServer) -> None:
        assert "check user, password, token or creds" in await refused(f"nats://127.0.0.1:{server.port}")

    @pytest.mark.parametrize(
        "make",
        [lambda file: None, lambda file: file.symlink_to(file), lambda file: file.mkdir(), lambda file: file.touch(0)],
        ids=["missing", "a link to itself", "a directory", "not permitted"],
    )
    async def test_a_file_that_cannot_be_read_is_named(self, url: str, file: Path, make: Callable[[Path], None]) -> None:
        make(file)
        sentence = await refused(url)
        assert "credentials file" in sentence
        assert str(file) in sentence

    @pytest.mark.parametrize(
        "broken",
        [
            lambda token, seed: "",
            lambda token, seed: token,
            lambda token, seed: seed,
            lambda token, seed: a_file(token, seed).replace("NATS USER JWT", "JWT"),
            lambda token, seed: a_file(token, seed).replace("NKEY SEED", "SEED"),
            lambda token, seed: a_file(token, ""),
            lambda token, seed: a_file("", seed),
            lambda token, seed: a_file(token, seed[:-1]),
            lambda token, seed: a_file(token, seed.replace("SU", "XX", 1)),
            lambda token, seed: a_file(token, seed[:20] + "!" + seed[21:]),
            lambda token, seed: a_file(token + "é", seed),
            lambda token, seed: a_file(token, seed).split(seed)[0],
        ],
        ids=[
            "empty",
            "a token alone",
            "a seed alone",
            "no token",
            "no seed",
            "an empty seed",
            "an empty token",
            "a short seed",
            "another seed",
            "no base32",
            "no ASCII",
            "cut off",
        ],
    )
    async def test_one_that_is_no_credentials_file_is_named_and_not_repeated(
        self,
        accounts: Mapping[str, Key],
        url: str,
        file: Path,
        write: Callable[[str], object],
        broken: Callable[[str, str], str],
    ) -> None:
        token, seed = a_user(accounts["streaming"])
        write(broken(token, seed))
        with pytest.raises(StorageError, match="no credentials file: it holds a user's token and seed") as raised:
            await use(url)
        assert str(file) in str(raised.value)
        assert_not_repeated(raised.value, token, seed)

    async def test_who_the_server_does_not_know_is_told_what_to_check_and_not_repeated(
        self, accounts: Mapping[str, Key], url: str, write: Callable[[str], object]
    ) -> None:
        token, seed = a_user(accounts["unknown"])
        _, another = a_user(accounts["streaming"])
        expired, its = a_user(accounts["streaming"], seconds=-60)
        for who in ((token, seed), (a_user(accounts["streaming"])[0], another), (expired, its)):
            write(a_file(*who))
            with pytest.raises(StorageError, match="refuses who we are: check user, password, token or creds") as raised:
                await use(url)
            assert not isinstance(raised.value, StorageUnavailableError)
            assert_not_repeated(raised.value, *who)

    async def test_a_user_of_an_account_without_jetstream_is_told_so_and_not_repeated(
        self, accounts: Mapping[str, Key], url: str, write: Callable[[str], object]
    ) -> None:
        who = a_user(accounts["plain"])
        write(a_file(*who))
        with pytest.raises(StorageError, match="enable JetStream for the account") as raised:
            await use(url)
        assert_not_repeated(raised.value, *who)


def assert_not_repeated(error: StorageError, *secrets: str) -> None:
    """Fail if a traceback would show the secrets, or the half of one."""
    shown = "".join(traceback.format_exception(error))
    assert not [secret for secret in secrets if secret[: len(secret) // 2] in shown or secret[len(secret) // 2 :] in shown]
