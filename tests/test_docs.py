"""What the README and the docs show, runs; what they link to, is there.

A block of Python that begins with an import, or with a comment that names its file (`# app.py`), is a whole program, and is run. One
that has tests in it is run by pytest. All others are fragments, and must compile; so must JavaScript. A block of `py` wants what is not
here, a broker or another server: it must compile as well.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
ASKING = {ROOT / "docs/how-to/sdks.md"}  # its programs ask a provider: tests/sdks/test_page.py has one, and runs them
FILE_NAME = re.compile(r"# ([a-z_]+\.py)\n")


def blocks(page: Path) -> list[str]:
    """Give the Python that a page shows."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def is_program(block: str) -> bool:
    return block.startswith(("import ", "from ")) or FILE_NAME.match(block) is not None


def named_files(page: Path) -> dict[str, str]:
    """Give the files that a page shows by their names."""
    return {match[1]: block for block in blocks(page) if (match := FILE_NAME.match(block))}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readmes_twenty_lines_print_what_the_readme_says(tmp_path: Path) -> None:
    program = next(block for block in blocks(ROOT / "README.md") if "asyncio.run" in block)
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout.splitlines() == ["1 {'text': 'is'}", "2 {'text': 'lost'}", "3 {'text': 'Nothing is lost'}"]
    assert all(f"`{line}`" in (ROOT / "README.md").read_text() for line in ran.stdout.splitlines())


def test_the_loop_around_genkits_client_is_the_one_that_is_tested() -> None:
    shown = re.findall(
        r"^```js\n.*?^(export async function\* reconnecting.*?)^```$",
        (ROOT / "docs/reference/http.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    tested = (ROOT / "tests/network/reconnecting.mjs").read_text()
    assert shown == [tested[tested.index("export async function*") :]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_looks_like_a_table_is_one(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    assert [table for table in tables if not re.match(r"\|.*\n\|[-:| ]+\|\n", table)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_section_that_a_page_links_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text())
    missing = [
        f"{path}#{section}" for path, section in targets if section not in sections(page.parent / path if path else page)
    ]
    assert missing == []


def sections(page: Path) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/how-to/*.md")), ids=name_of)
def test_a_how_to_says_what_to_install(page: Path) -> None:
    assert re.search(r'pip install (streamkeep|"streamkeep\[\w+(,\w+)*\]")', page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_python_that_a_page_shows_is_python(page: Path) -> None:
    for block in blocks(page):
        compile("async def shown():\n" + re.sub("^", "    ", block, flags=re.MULTILINE), str(page), "exec", dont_inherit=True)


def fragments(language: str) -> list[tuple[str, str]]:
    """Give the code of one language that pages show, lists included, each with the name of its page."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [(name_of(page), dedent(found[2])) for page in PAGES for found in fence.finditer(page.read_text())]


def test_the_python_that_is_not_run_is_python() -> None:
    assert fragments("py")
    for page, code in fragments("py"):
        compile("async def shown():\n" + indent(code, "    "), page, "exec", dont_inherit=True)


def test_the_javascript_that_a_page_shows_is_javascript(requires: Callable[[str], str], tmp_path: Path) -> None:
    shown = fragments("js")
    files = [tmp_path / f"{number}.mjs" for number in range(len(shown))]
    for file, (_, code) in zip(files, shown, strict=True):
        file.write_text(code)
    node = requires("node")
    wrong = [
        (page, checked.stderr)
        for file, (page, _) in zip(files, shown, strict=True)
        if (
            checked := subprocess.run([node, "--check", file], capture_output=True, text=True, timeout=30, check=False)
        ).returncode
    ]
    assert shown
    assert wrong == []


def test_the_extras_that_a_page_installs_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        (name_of(page), extra)
        for page in PAGES
        for names in re.findall(r"streamkeep\[([a-z0-9,]+)\]", page.read_text())
        for extra in names.split(",")
    }
    assert {(page, extra) for page, extra in named if extra not in extras} == set()


PROGRAMS = [
    pytest.param(page, block, id=f"{name_of(page)}-{number}")
    for page in PAGES
    if page not in ASKING
    for number, block in enumerate(blocks(page))
    if is_program(block)
]


@pytest.mark.parametrize(("page", "block"), PROGRAMS)
def test_a_program_that_a_page_shows_runs_without_a_warning(page: Path, block: str, tmp_path: Path) -> None:
    for name, text in named_files(page).items():
        (tmp_path / name).write_text(text)
    if "def test_" in block:
        (tmp_path / "test_shown.py").write_text(block)
        command = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "anyio",
            "-p",
            "no:cacheprovider",
            "-c",
            "none.ini",
            "--rootdir",
            ".",
            "test_shown.py",
        ]
        (tmp_path / "none.ini").write_text("[pytest]\n")
    else:
        command = ["-W", "error", "-c", block]
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OPENAI_API_KEY": "none"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
