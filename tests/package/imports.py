"""`python imports.py MODULE...`: prints, as JSON, what the import of each has raised, or null. Knows nothing of the tests."""

import importlib
import json
import sys


def what_is_raised(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


print(json.dumps({module: what_is_raised(module) for module in sys.argv[1:]}))
