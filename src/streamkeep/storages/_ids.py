"""Ids as engines keep them."""

from streamkeep.errors import InvalidArgumentError


def id_bytes(stream: str) -> bytes:
    """Give an id in UTF-8, whose order is that of the code points. InvalidArgumentError: it has lone surrogates, and so is no text."""
    try:
        return stream.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError("an id must be Unicode text, without lone surrogates") from None
