"""The page about the client: its programs run against its server, and print what they should."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx2
import pytest
from tests.client.forms import free_port
from tests.test_docs import ROOT

PAGE: Final = (ROOT / "docs/how-to/client.md").read_text()
PROGRAMS: Final = dict(re.findall(r"^```(?:python|py)\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SERVERS: Final = ("server.py", "members.py")
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
    "member.py": """0 chunk
1 chunk
2 chunk
3 done
""",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give where the page's servers are, by where it says that they are."""
    directory, ports = tmp_path_factory.mktemp("servers"), (free_port(), free_port())
    with ExitStack() as stack:
        for name, port in zip(SERVERS, ports, strict=True):
            (directory / name).write_text(PROGRAMS[name])
            app = f"{name.removesuffix('.py')}:app"
            command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--log-level", "error"]
            process = stack.enter_context(subprocess.Popen(command, cwd=directory))
            stack.callback(process.kill)
        with httpx2.Client(transport=httpx2.HTTPTransport(retries=8)) as http:  # half a minute, as pauses double
            http.get(f"http://127.0.0.1:{ports[1]}/")  # a login is not tried again, as our client's requests are
        yield {f"http://127.0.0.1:800{number}": f"http://127.0.0.1:{port}" for number, port in enumerate(ports)}


def test_every_program_is_tested() -> None:
    assert PROGRAMS.keys() == PRINTED.keys() | set(SERVERS)


def test_the_pages_programs_print_what_they_should(servers: dict[str, str], tmp_path: Path) -> None:
    for name, printed in PRINTED.items():
        program = PROGRAMS[name]
        for shown, server in servers.items():
            program = program.replace(shown, server)
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
