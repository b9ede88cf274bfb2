"""A full disk, for real: what happens to writers, readers, sweeps and those who open and close."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from tests.powerloss.small_disk import BOUND_SECONDS, SCENARIOS

ROOT: Final = Path(__file__).parents[2]
IS_ROOT: Final = os.geteuid() == 0
NAMESPACE: Final = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module", autouse=True)
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A disk is mounted in a namespace of its own, so that nobody else sees it, and it goes with the process."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path_factory.mktemp("disk"))]
    try:
        subprocess.run([*NAMESPACE, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sentence = f"no disk can be mounted here: {error}"
        if IS_ROOT and os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.promise("P16")
def test_on_a_full_disk(scenario: str, tmp_path: Path) -> None:
    command = [*NAMESPACE, sys.executable, "-m", "tests.powerloss.small_disk", scenario, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BOUND_SECONDS + 5, check=False)
    assert process.returncode == 0, process.stderr
