"""Webhooks: where they may go, how they are signed, and how one is sent.

A URL comes over the wire, and so may point at what only this server can reach. It is checked when it is given, and again each time it is
used: a name is resolved once, every address that it has is checked, and the connection goes to one of these. Redirects are not followed.
"""

import base64
import hmac
import ipaddress
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urlsplit

import anyio
import msgspec
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from h11 import Connection

MAX_URL: Final = 2_048
MAX_ANSWER_BYTES: Final = 1 << 16
TOKEN_SECONDS: Final = 86_400.0
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def check_installed() -> None:
    """Raise InvalidArgumentError unless all is installed that subscriptions need."""
    try:
        import cryptography
        import h11
    except ImportError as error:
        raise InvalidArgumentError('subscriptions need packages more: pip install "streamkeep[durable-streams]"') from error
    del cryptography, h11


class WebhookRejectedError(Exception):
    """Nothing is sent there."""


class WebhookFailedError(Exception):
    """It was not taken; it is tried again later."""


def check_url(url: str, *, allow_local: bool) -> SplitResult:
    """Give a URL's parts. WebhookRejectedError: it is not https, or local; `allow_local`: localhost and 127.0.0.x are fine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise WebhookRejectedError("the URL cannot be read") from None
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise WebhookRejectedError("the URL is too long, or has characters that URLs have not")
    if not host or "@" in parts.netloc or parts.fragment:
        raise WebhookRejectedError("the URL has no host, or a user, or a fragment")
    if allow_local and is_local(host) and parts.scheme in {"http", "https"}:
        return parts
    if parts.scheme != "https":
        raise WebhookRejectedError("a webhook's URL is https")
    host = host.rstrip(".")
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        raise WebhookRejectedError("the URL is of this network")
    if (address := _address(host) or _address_as_c_reads_it(host)) is not None and not _is_public(address):
        raise WebhookRejectedError("the URL is of this network")
    return parts


def is_local(host: str) -> bool:
    """Say whether a host is this machine, as a developer writes it."""
    if host == "localhost":
        return True
    address = _address(host)
    return isinstance(address, ipaddress.IPv4Address) and address in ipaddress.ip_network("127.0.0.0/24")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _address_as_c_reads_it(text: str) -> ipaddress.IPv4Address | None:
    # 2130706433, 0x7f.1 and 127.1 are 127.0.0.1 to whoever connects.
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except OSError:
        return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _resolved(parts: SplitResult, port: int, *, allow_local: bool) -> Sequence[str]:
    """Give the addresses of a URL's host. Every one that it has must be public: which one is meant, nobody knows."""
    host = parts.hostname or ""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM) if _address(host) is None else None
    addresses = [host] if found is None else [str(entry[4][0]) for entry in found]
    local = allow_local and is_local(host)
    for text in addresses:
        address = _address(text.partition("%")[0])
        if address is None or not (_is_public(address) or (local and address.is_loopback)):
            raise WebhookRejectedError("the host has an address that is not public")
    if not addresses:
        raise WebhookFailedError("the host has no address")
    return list(dict.fromkeys(addresses))


async def post(url: str, body: bytes, headers: Mapping[str, str], *, within: float, allow_local: bool) -> bytes:
    """Send a webhook; give the body of its answer. WebhookFailedError: it was not taken. WebhookRejectedError: nothing was sent."""
    parts = check_url(url, allow_local=allow_local)
    try:
        with anyio.fail_after(within):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            addresses = await _resolved(parts, port, allow_local=allow_local)
            async with await _connect(parts, addresses, port, within / len(addresses)) as stream:
                return await _exchange(stream, parts, body, headers)
    except (OSError, TimeoutError, anyio.BrokenResourceError, anyio.EndOfStream, ssl.SSLError, UnicodeError) as error:
        raise WebhookFailedError(f"the webhook cannot be reached: {type(error).__name__}") from error


async def _connect(parts: SplitResult, addresses: Sequence[str], port: int, within: float) -> ByteStream:
    stream = await _first_of(addresses, port, within)
    if parts.scheme != "https":
        return stream
    try:
        return await TLSStream.wrap(stream, hostname=parts.hostname, ssl_context=_trusted(), standard_compatible=False)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _first_of(addresses: Sequence[str], port: int, within: float) -> ByteStream:
    """Connect to the first address that answers: localhost may be ::1 as well, where nobody listens."""
    for address in addresses[:-1]:
        with suppress(OSError), anyio.move_on_after(within):
            return await anyio.connect_tcp(address, port)
    return await anyio.connect_tcp(addresses[-1], port)


@cache
def _trusted() -> ssl.SSLContext:
    # Reading all certificates takes so long that the event loop must not stand still for each webhook.
    return ssl.create_default_context()


async def _exchange(stream: ByteStream, parts: SplitResult, body: bytes, headers: Mapping[str, str]) -> bytes:
    import h11

    connection = h11.Connection(our_role=h11.CLIENT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    ours = {"host": parts.netloc, "content-length": str(len(body)), "connection": "close", "user-agent": "streamkeep"}
    request = h11.Request(method="POST", target=target, headers=list({**headers, **ours}.items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        await stream.send(connection.send(event) or b"")
    try:
        code, answer = await _response(connection, stream)
    except h11.RemoteProtocolError as error:
        raise WebhookFailedError("the webhook's answer is no HTTP") from error
    if not 200 <= code < 300:
        raise WebhookFailedError(f"the webhook answered {code}")
    return answer


async def _response(connection: "Connection", stream: ByteStream) -> tuple[int, bytes]:
    import h11

    code, answer = 0, bytearray()
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                try:
                    data = await stream.receive()
                except anyio.EndOfStream:
                    data = b""
                connection.receive_data(data)
            case h11.Response(status_code=code):
                pass
            case h11.Data(data=data):
                answer += data
                if len(answer) > MAX_ANSWER_BYTES:
                    raise WebhookFailedError("the webhook's answer is too long")
            case h11.EndOfMessage() | h11.ConnectionClosed():
                return code, bytes(answer)
            case _:
                pass  # an answer that says that another one follows


# Signing and tokens: sections 6.5, 7.1 and 12.9


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What a callback or claim token says."""

    kind: str
    subscription: str
    life: str
    generation: int
    expires_at: float


class Signer:
    """Signs webhooks, and makes tokens, with one private key: 32 bytes."""

    def __init__(self, private: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self._secret = hmac.digest(private, b"streamkeep durable streams tokens", "sha256")
        x = _text(self._key.public_key().public_bytes_raw())
        thumbprint = sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}'.encode()).digest()  # RFC 7638
        self.kid: Final = f"ds_{_text(thumbprint)[:22]}"
        self.jwks: Final[Mapping[str, object]] = {
            "keys": [{"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "use": "sig", "alg": "EdDSA", "x": x}]
        }

    def signature(self, body: bytes, now: float) -> str:
        """Give the header that proves who has sent a body, and when."""
        at = str(int(now))
        return f"t={at},kid={self.kid},ed25519={_text(self._key.sign(at.encode() + b'.' + body))}"

    def token(self, kind: str, subscription: str, life: str, generation: int, now: float) -> str:
        """Give a token for one generation of a subscription."""
        said = msgspec.json.encode(Token(kind, subscription, life, generation, now + TOKEN_SECONDS))
        return f"{_text(said)}.{_text(hmac.digest(self._secret, said, 'sha256'))}"

    def read(self, token: str) -> Token | None:
        """Give what a token says; None: it is not one that was made here."""
        said, _, mac = token.partition(".")
        try:
            content = base64.urlsafe_b64decode(said + "=" * (-len(said) % 4))
            given = base64.urlsafe_b64decode(mac + "=" * (-len(mac) % 4))
        except ValueError:
            return None
        if not hmac.compare_digest(given, hmac.digest(self._secret, content, "sha256")):
            return None
        return msgspec.json.decode(content, type=Token)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
