"""What is said where the extra is not installed."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["streamkeep.client", "streamkeep.client.sync"])
def test_without_the_extra_its_name_is_said(module: str) -> None:
    program = f"import sys\nsys.modules['httpx2'] = None\nimport streamkeep\nimport {module}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 1
    assert (
        ran.stderr.splitlines()[-1]
        == "ModuleNotFoundError: streamkeep.client needs httpx2, which is not installed: pip install 'streamkeep[client]'"
    )


@pytest.mark.parametrize("module", ["streamkeep.http", "streamkeep.sync", "streamkeep.cli", "streamkeep.demo.app"])
def test_nothing_else_needs_it(module: str) -> None:
    program = f"import sys\nsys.modules['httpx2'] = None\nimport {module}"
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


def test_without_the_sdk_of_a2a_its_extra_is_said() -> None:
    program = "import sys\nsys.modules['a2a'] = None\nimport streamkeep.integrations.a2a"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    said = "ModuleNotFoundError: streamkeep.integrations.a2a needs a2a, which is not installed: pip install 'streamkeep[a2a]'"
    assert ran.stderr.splitlines()[-1] == said
