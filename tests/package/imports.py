"""`python imports.py [--without PACKAGE] MODULE...`: prints, as JSON, what the import of each has raised, or null. Knows no tests.

Modules are imported without a package as if that one alone were not installed.
"""

import importlib
import json
import sys


class Without:
    """Finds nothing of a package, before all who would find it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def what_is_raised(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


modules = sys.argv[1:]
if modules[0] == "--without":
    sys.meta_path.insert(0, Without(modules[1]))
    del modules[:2]
print(json.dumps({module: what_is_raised(module) for module in modules}))
