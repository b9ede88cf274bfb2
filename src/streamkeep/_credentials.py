"""What a token or a password needs wherever it is sent: not to be sent in clear text unsaid."""

import ipaddress
import logging
from functools import lru_cache
from typing import Final

logger: Final = logging.getLogger("streamkeep")


def warn_of_clear_text(scheme: str, host: str) -> None:
    """Warn, once for each host, that a credential goes there unencrypted. Nobody listens on the way to this machine itself."""
    if scheme == "http" and not is_loopback(host):
        _warn_once(host)


def is_loopback(host: str) -> bool:
    """Say whether a host's name or address is this machine's own (RFC 6761, 6.3)."""
    name = host.lower().rstrip(".")
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


@lru_cache(maxsize=1024)
def _warn_once(host: str) -> None:
    logger.warning(
        "a token or a password is sent to %s in clear text, over http://, for all on the way to read; use https://", host
    )
