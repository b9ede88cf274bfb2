"""Credentials files, as `nsc generate creds` writes them: a user's token, and the seed of the key that proves who he is."""

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from streamkeep._extras import needed_by
from streamkeep.errors import StorageError

_CREDENTIALS: Final = re.compile(
    rb"BEGIN NATS USER JWT-+\s+(\w[\w-]*\.[\w-]+\.[\w-]+)\s.*BEGIN USER NKEY SEED-+\s+(SUA[A-Z2-7]{55})\s", re.DOTALL
)


def credentials_in(path: Path, nonce: str) -> Mapping[str, str]:
    """Give what a server wants to see of a credentials file. StorageError, which repeats nothing of it: it cannot be read, or is none."""
    try:
        found = _CREDENTIALS.search(path.read_bytes())
    except OSError as error:
        raise StorageError(f"the credentials file cannot be read: {error}") from error
    if found is None:
        raise _no_credentials(path)
    token, seed = found.groups()
    return {"jwt": token.decode(), "sig": _signed(nonce, seed, path)}


def _signed(nonce: str, seed: bytes, path: Path) -> str:
    try:
        with needed_by("a file of credentials", "nats"):
            import nkeys  # type: ignore[import-untyped]  # it has no types
    except ModuleNotFoundError as error:
        raise StorageError(str(error)) from error
    try:
        signature: bytes = nkeys.from_seed(bytearray(seed)).sign(nonce.encode())
    except Exception:  # whatever it raises may repeat the seed
        raise _no_credentials(path) from None
    return urlsafe_b64encode(signature).decode().rstrip("=")


def _no_credentials(path: Path) -> StorageError:
    return StorageError(f"{path} is no credentials file: it holds a user's token and seed, as 'nsc generate creds' writes them")
