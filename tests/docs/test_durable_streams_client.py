"""The page about clients of Durable Streams: its programs run against its server, and print what they should."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
import pytest
from tests.client.forms import free_port
from tests.test_docs import ROOT

PAGE: Final = (ROOT / "docs/how-to/durable-streams-client.md").read_text()
PROGRAMS: Final = dict(re.findall(r"^```(?:python|py)\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
PRINTED: Final = {
    "read.py": "{'chunk': 'Nothing'}\n{'chunk': 'is'}\n{'chunk': 'lost'}\n{'result': {'words': 3}}\nclosed: True\n",
    "write.py": "closed: True\n1001 that was all\n",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give where the page's server is, which was asked once."""
    directory, port = tmp_path_factory.mktemp("server"), free_port()
    (directory / "server.py").write_text(PROGRAMS["server.py"])
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=directory) as process:
        try:
            with httpx2.Client(transport=httpx2.HTTPTransport(retries=8), timeout=30) as http:
                assert http.post(f"http://127.0.0.1:{port}/ask/Nothing-is-lost").status_code == 200
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.mark.parametrize("name", PRINTED)
def test_a_program_of_the_page_prints_what_it_should(name: str, server: str, tmp_path: Path) -> None:
    program = PROGRAMS[name].replace("http://127.0.0.1:8000", server)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ran.stdout, ran.stderr) == (PRINTED[name], "")


def test_all_programs_of_the_page_are_run() -> None:
    assert set(PROGRAMS) == {"server.py", *PRINTED}
