"""What the README and the docs show, runs; what they link to, is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_twenty_lines_print_what_the_readme_says(tmp_path: Path) -> None:
    program = next(block for block in blocks(ROOT / "README.md") if "asyncio.run" in block)
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout.splitlines() == ["1 {'text': 'is'}", "2 {'text': 'lost'}", "3 {'text': 'Nothing is lost'}"]
    assert all(f"`{line}`" in (ROOT / "README.md").read_text() for line in ran.stdout.splitlines())


def test_the_loop_around_genkits_client_is_the_one_that_is_tested() -> None:
    shown = re.findall(
        r"^```js\n.*?^(export async function\* reconnecting.*?)^```$",
        (ROOT / "docs/how-to/serve.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    tested = (ROOT / "tests/network/reconnecting.mjs").read_text()
    assert shown == [tested[tested.index("export async function*") :]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_that_a_page_shows_is_python(page: Path) -> None:
    for block in blocks(page):
        compile("async def shown():\n" + re.sub("^", "    ", block, flags=re.MULTILINE), str(page), "exec", dont_inherit=True)


PROGRAMS = [
    block
    for page in ("write", "read", "keys")
    for block in blocks(ROOT / f"docs/how-to/{page}.md")
    if "from streamkeep import StreamManager" in block or "from streamkeep import StreamEventType" in block
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_the_programs_on_reading_and_writing_run_without_a_warning(block: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, check=True, timeout=30)
