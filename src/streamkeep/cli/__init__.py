"""The command `streamkeep`: look at the streams of a storage, serve them, run the demo. Extra: `streamkeep[cli]`."""

import sys
from typing import Final

__all__ = ["main"]

NEEDED: Final = {"cyclopts", "rich", "uvicorn"}


def main() -> None:
    """Run the command line, and exit: 0 done, 1 failed, 2 wrongly called, 130 interrupted."""
    try:
        from ._commands import run
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        sys.exit(f"streamkeep: the command needs {error.name}, which is not installed: pip install 'streamkeep[cli]'")
    sys.exit(run())
