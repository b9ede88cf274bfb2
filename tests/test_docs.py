"""What the README and the docs show, runs; what they link to, is there.

A block of Python that begins with an import, or with a comment that names its file (`# app.py`), is a whole program, and is run. One
that has tests in it is run by pytest. All others are fragments, and must compile; so must JavaScript. A block of `py` wants what is not
here, a broker or another server: it must compile as well. A block in no language of `LANGUAGES` would be looked at by nobody, and so
would Python that is in a list.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest
from website.markdown import anchors_of, targets_of

from streamkeep.cli._commands import app

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
ASKING = {ROOT / "docs/how-to/sdks.md"}  # its programs ask a provider: tests/sdks/test_page.py has one, and runs them
LANGUAGES = {
    "caddyfile",
    "console",
    "dockerfile",
    "html",
    "ini",
    "js",
    "json",
    "jsx",
    "nginx",
    "py",
    "python",
    "sh",
    "sql",
    "text",
}
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
    assert [target for target, _ in links_of(page) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_looks_like_a_table_is_one(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    assert [table for table in tables if not re.match(r"\|.*\n\|[-:| ]+\|\n", table)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_section_that_a_page_links_to_is_there(page: Path) -> None:
    there = {target: page.parent / target if target else page for target, _ in links_of(page)}
    missing = [
        f"{target}#{section}"
        for target, section in links_of(page)
        if section and section not in anchors_of(there[target].read_text())
    ]
    assert missing == []


def links_of(page: Path) -> list[tuple[str, str]]:
    """Give the files that a page links to, and the section of each; "" for the page itself, and for the whole file."""
    targets = [target.partition("#") for target in targets_of(page.read_text()) if not re.match(r"[a-z]+:", target)]
    return [(path, section) for path, _, section in targets]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/how-to/*.md")), ids=name_of)
def test_a_how_to_says_what_to_install(page: Path) -> None:
    assert re.search(r'pip install (streamkeep|"streamkeep\[\w+(,\w+)*\]")', page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_python_that_a_page_shows_is_python(page: Path) -> None:
    for block in blocks(page):
        compile("async def shown():\n" + re.sub("^", "    ", block, flags=re.MULTILINE), str(page), "exec", dont_inherit=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_no_block_of_code_that_nobody_looks_at(page: Path) -> None:
    """It is in a language that is known, as it is written here; and it has an end."""
    assert blocks_that_nobody_looks_at(page.read_text()) == []


def blocks_that_nobody_looks_at(text: str) -> list[str]:
    known = re.compile(rf"^( *)```({'|'.join(sorted(LANGUAGES))})\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    in_lists = [f"{found[1]}```python" for found in known.finditer(text) if found[1] and found[2] == "python"]
    return in_lists + re.findall(r"^[ >*-]*(?:```|~~~).*$", known.sub("", text), re.MULTILINE)


@pytest.mark.parametrize(
    "fence",
    ["```", "```pyhton", "```Python", "```python title", "``` python", "````python", "~~~python", "  ```python", "> ```python"],
)
def test_a_block_that_nobody_looks_at_is_found(fence: str) -> None:
    marks = re.sub(r"\w.*", "", fence).rstrip()
    assert blocks_that_nobody_looks_at(f"# A\n\n{fence}\nimport nothing\n{marks}\n") != []
    assert blocks_that_nobody_looks_at("# A\n\n```python\nimport nothing\n```\n\n- b\n\n  ```js\n  c\n  ```\n") == []
    assert blocks_that_nobody_looks_at("# A\n\n```python\nimport nothing\n") != []


def test_the_json_that_a_page_shows_is_json() -> None:
    assert fragments("json")
    for _, code in fragments("json"):
        json.loads(code)


def test_the_commands_of_ours_that_a_page_shows_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`streamkeep` with its arguments, and the verbs of `./dev`."""
    typed = [line for _, code in fragments("sh") for line in code.splitlines()]
    typed += [
        line.removeprefix("$ ") for _, code in fragments("console") for line in code.splitlines() if line.startswith("$ ")
    ]
    ours = [found[1] for line in typed if (found := re.match(r"(?:\w+=\S+ )*streamkeep ([a-z].*)", line))]
    commands = [shlex.split(re.split(r" [>|#&]", words)[0]) for words in ours]
    assert len(commands) > 20
    monkeypatch.setenv("STREAMKEEP_STORAGE", "memory://")  # as the page has one set it
    for words in commands:
        app.parse_args(words, exit_on_error=False, print_error=False)
    verbs = set(re.findall(r"^    ([a-z-]+)\)$", (ROOT / "dev").read_text(), re.MULTILINE))
    assert {
        (page, verb) for page in PAGES for verb in re.findall(r"\./dev ([a-z-]+)", page.read_text()) if verb not in verbs
    } == set()


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
