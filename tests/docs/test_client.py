"""The page about the client: its programs run against its server, and print what they should."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.client.forms import free_port
from tests.test_docs import ROOT

PAGE: Final = (ROOT / "docs/how-to/client.md").read_text()
PROGRAMS: Final = dict(re.findall(r"^```(?:python|py)\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
PRINTED: Final = {
    "read.py": """0 Nothing
1 is
2 lost
from 1
1 chunk
2 chunk
3 done
stopped: False
""",
    "anybody.py": """0 chunk {"text":"Nothing"}
1 chunk {"text":"is"}
2 chunk {"text":"lost"}
3 done null
""",
    "flow.py": """NOTHING
IS
LOST
NOTHING IS LOST
['LOST']
ONCE MORE
""",
    "blocking.py": """0 chunk
1 chunk
2 chunk
3 done
NOTHING IS LOST
""",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give where the page's server is."""
    directory, port = tmp_path_factory.mktemp("server"), free_port()
    (directory / "server.py").write_text(PROGRAMS["server.py"])
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=directory) as process:
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_every_program_is_tested() -> None:
    assert PROGRAMS.keys() == PRINTED.keys() | {"server.py"}


def test_the_pages_programs_print_what_they_should(server: str, tmp_path: Path) -> None:
    for name, printed in PRINTED.items():
        program = PROGRAMS[name].replace("http://127.0.0.1:8000", server)
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=50,
            check=False,
        )
        assert ran.stdout == printed, name
