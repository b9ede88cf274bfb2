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
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        is_missing = isinstance(error, ModuleNotFoundError) and sys.modules.get(package) is None
        what = (
            f"{package}, which is not installed"
            if is_missing
            else f"another version of {package} than the one that is installed"
        )
        sys.exit(f"streamkeep: this needs {what}: pip install 'streamkeep[{EXTRAS[package]}]'")
    sys.exit(code)
