"""The URLs of RedisStorage: where the servers are, how they are entered, and what streamkeep's own options are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from streamkeep.errors import InvalidArgumentError

Topology = Literal["single", "sentinel", "cluster"]
Address = tuple[str, int]

FORMS: Final = (
    "redis://USER:PASSWORD@HOST:6379/0?prefix=streamkeep&wait=0, "
    "redis+sentinel://HOST:26379,HOST:26379/PRIMARY/0 or redis+cluster://HOST:7000,HOST:7001; with TLS they begin with rediss"
)

_PORTS: Final[Mapping[Topology, int]] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s\[\]:/@]+))(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who we are there; empty where nobody asks."""

    username: str = ""
    password: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """A URL, taken apart."""

    topology: Topology
    addresses: tuple[Address, ...]
    """The server; or the sentinels; or some nodes of the cluster."""
    primary: str
    """What the sentinels call it."""
    database: int
    credentials: Credentials
    sentinel_credentials: Credentials
    tls: Mapping[str, str] | None
    """Files by redis-py's names for them; None without TLS."""
    prefix: str
    wait: int

    @property
    def name(self) -> str:
        """The URL as messages may show it."""
        scheme = ("redis" if self.tls is None else "rediss") + ("" if self.topology == "single" else f"+{self.topology}")
        hosts = ",".join(shown(address) for address in self.addresses)
        return f"{scheme}://{hosts}" + (f"/{self.primary}" if self.primary else "")


def shown(address: Address) -> str:
    """Write an address for people."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def options_of(url: str) -> Options:
    """Take a URL apart. InvalidArgumentError, which does not repeat it: it may hold a password."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise _wrong("it is no URL") from None
    if parts.fragment:
        raise _wrong("percent-encode '#' as %23")
    topology, has_tls = _scheme(parts.scheme)
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    primary, database = _path(topology, [unquote(word) for word in parts.path.split("/")[1:]])
    options = _query(query, topology, has_tls=has_tls)
    return Options(
        topology=topology,
        addresses=_addresses(hosts, topology),
        primary=primary,
        database=database,
        credentials=Credentials(unquote(username), unquote(password)),
        sentinel_credentials=Credentials(options.get("sentinel_username", ""), options.get("sentinel_password", "")),
        tls={name: options[name] for name in _TLS_OPTIONS if name in options} if has_tls else None,
        prefix=_prefix(options.get("prefix", "streamkeep")),
        wait=_number(options.get("wait", "0"), "wait is a number of replicas"),
    )


def _scheme(scheme: str) -> tuple[Topology, bool]:
    match scheme.split("+"):
        case ["redis" | "rediss" as base]:
            return "single", base == "rediss"
        case ["redis" | "rediss" as base, "sentinel"]:
            return "sentinel", base == "rediss"
        case ["redis" | "rediss" as base, "cluster"]:
            return "cluster", base == "rediss"
        case _:
            raise _wrong("the scheme is another one")


def _addresses(hosts: str, topology: Topology) -> tuple[Address, ...]:
    addresses = (
        tuple(_address(host, _PORTS[topology]) for host in hosts.split(",")) if hosts else (("localhost", _PORTS[topology]),)
    )
    if topology == "single" and len(addresses) > 1:
        raise _wrong("several hosts are for redis+sentinel:// and redis+cluster://")
    return addresses


def _address(host: str, port: int) -> Address:
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match[3] or port) < 65536:
        raise _wrong("a host is not HOST or HOST:PORT")
    return match[1] or match[2], int(match[3] or port)


def _path(topology: Topology, words: list[str]) -> tuple[str, int]:
    if words == [""]:
        words = []
    if topology == "sentinel":
        if not words or not words[0]:
            raise _wrong("the path names the primary, as the sentinels call it")
        primary, *words = words
    else:
        primary = ""
    if topology == "cluster" and words:
        raise _wrong("a cluster has no numbered databases")
    if len(words) > 1:
        raise _wrong("the path is the number of the database")
    return primary, _number(words[0], "the path is the number of the database") if words else 0


def _query(query: list[tuple[str, str]], topology: Topology, *, has_tls: bool) -> dict[str, str]:
    options = dict(query)
    known = {"prefix", "wait"}
    if has_tls:
        known.update(_TLS_OPTIONS)
    if topology == "sentinel":
        known.update(_SENTINEL_OPTIONS)
    if len(options) < len(query) or not options.keys() <= known:
        raise _wrong(f"its options are {', '.join(sorted(known))}, each at most once")
    return options


def _prefix(prefix: str) -> str:
    if not _PREFIX.fullmatch(prefix):
        raise _wrong("prefix is 1 to 64 of A-Z a-z 0-9 _ . : -")
    return prefix


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise _wrong(what)
    return int(text)


def _wrong(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"this is no URL of Redis: {reason}; known are {FORMS}")
