"""What is said where an optional package is missing, or is of a version that has not what we use: which of our extras brings it."""

import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needed_by(who: str, extra: str) -> Generator[None]:
    """Import what an extra brings, in a `with` block.

    Where it is missing, ModuleNotFoundError says who needs it, and what to install. Where the one that is installed does not have what
    is imported, ImportError does.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "streamkeep":  # a fault of ours, or what says this already
            raise
        install = f"pip install 'streamkeep[{extra}]'"
        if isinstance(error, ModuleNotFoundError) and sys.modules.get(package) is None:
            raise ModuleNotFoundError(f"{who} needs {package}, which is not installed: {install}", name=error.name) from error
        raise ImportError(
            f"{who} needs another version of {package} than the one that is installed ({error}): {install}", name=error.name
        ) from error
