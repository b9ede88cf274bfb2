"""A user's program is checked by strict type checkers, in environments that have only the wheel and what it brings."""

import json
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest
from tests.package.environments import ALL, Workshop, ran

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONSUMERS: Final = Path(__file__).with_name("consumers")
TOOLS: Final = Path(sys.executable).parent
each_program = pytest.mark.parametrize(
    ("program", "extras"), [("alone.py", ["client"]), ("web.py", [ALL])], ids=["alone", "web"]
)


@each_program
def test_a_users_program_passes_strict_mypy(program: str, extras: list[str], workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(CONSUMERS / program, tmp_path)
    environment = workshop.environment(*extras)
    strict = ["--strict", "--no-incremental", "--config-file", "", "--enable-error-code", "deprecated"]
    said = ran([TOOLS / "mypy", *strict, "--python-executable", environment.python, program], tmp_path)
    assert "no issues found in 1 source file" in said


@each_program
def test_a_users_program_passes_strict_pyright(program: str, extras: list[str], workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(CONSUMERS / program, tmp_path)
    environment = workshop.environment(*extras)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps(
            {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "none", "enableTypeIgnoreComments": False}
        )
    )
    said = ran([TOOLS / "pyright", "--pythonpath", environment.python, program], tmp_path)
    assert "0 errors" in said


def test_a_program_that_is_wrong_fails(workshop: Workshop, tmp_path: Path) -> None:
    """So that what passes above does not pass for want of types."""
    (tmp_path / "wrong.py").write_text(
        "from streamkeep import StreamManager\n\nStreamManager.connect(42)\nStreamManager.nothing\n"
    )
    python = workshop.environment().python
    with pytest.raises(AssertionError, match=r'"type\[StreamManager\]" has no attribute "nothing"'):
        ran(
            [TOOLS / "mypy", "--strict", "--no-incremental", "--config-file", "", "--python-executable", python, "wrong.py"],
            tmp_path,
        )
    with pytest.raises(AssertionError, match="2 errors"):
        ran([TOOLS / "pyright", "--pythonpath", python, "wrong.py"], tmp_path)
