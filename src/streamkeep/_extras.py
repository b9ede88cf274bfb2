"""What is said where an optional package is missing: which of our extras brings it."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needed_by(who: str, extra: str) -> Generator[None]:
    """Import what an extra brings, in a `with` block: where it is missing, ModuleNotFoundError says who needs it, and what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} needs {error.name}, which is not installed: pip install 'streamkeep[{extra}]'", name=error.name
        ) from error
