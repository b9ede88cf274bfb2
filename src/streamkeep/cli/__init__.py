"""The command `streamkeep`: look at the streams of a storage, serve them, check a deployment, run the demo. Extra: `streamkeep[cli]`."""

import sys
from typing import Final

__all__ = ["main"]

EXTRAS: Final = {
    "cyclopts": "cli",
    "h11": "cli",
    "rich": "cli",
    "uvicorn": "cli",
    "httpx2": "client",
    "fastapi": "demo",
    "genkit": "demo",
    "pydantic": "demo",
    "starlette": "demo",
}


def main() -> None:
    """Run the command line, and exit: 0 done, 1 failed, 2 wrongly called, 130 interrupted."""
    try:
        from ._commands import run

        code = run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        sys.exit(f"streamkeep: this needs {missing}, which is not installed: pip install 'streamkeep[{EXTRAS[missing]}]'")
    sys.exit(code)
