"""What is imported of Genkit is where its releases from 0.12 on all have it."""

import subprocess
import sys
from typing import Final

import pytest

OLDER: Final = {
    "genkit": ("Action", "ActionKind", "Plugin", "ModelInfo", "ModelRequest", "Supports"),
    "genkit.plugin_api": ("model", "model_action_metadata"),
}
"""The names that Genkit 0.13 has taken from these modules, which has them in `genkit.plugin_api` and `genkit.model`."""

WITHOUT: Final = f"""
import importlib
for name, older in {OLDER!r}.items():
    module = importlib.import_module(name)
    for each in older:
        delattr(module, each)
"""


def imported(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + what], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("integration", ["django", "fastapi", "flask", "genkit", "_genkit_agents", "_genkit_turns"])
def test_integrations_need_none_of_the_names_that_genkit_0_13_has_moved(integration: str) -> None:
    ran = imported(f"import streamkeep.integrations.{integration}")
    assert ran.returncode == 0, ran.stderr


def test_the_demo_needs_none_of_them() -> None:
    ran = imported("import streamkeep.demo.app")
    assert ran.returncode == 0, ran.stderr


def test_they_are_gone_where_they_were() -> None:
    assert "ImportError" in imported("from genkit import Action").stderr
