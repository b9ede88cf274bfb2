"""What is said where an optional package is missing: which of our extras brings it."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needed_by(who: str, extra: str) -> Generator[None]:
    """Import what an extra brings, in a `with` block: where it is missing, ModuleNotFoundError says who needs it, and what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "a package").partition(".")[0]
        if missing == "streamkeep":  # a fault of ours, or what says this already
            raise
        raise ModuleNotFoundError(
            f"{who} needs {missing}, which is not installed: pip install 'streamkeep[{extra}]'", name=error.name
        ) from error
