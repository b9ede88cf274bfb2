"""The repository's promises about itself: what its files name, what the package shows, what its commands are."""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import streamkeep

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Put together here, so that this file does not name them either.
REGISTRIES = [
    ".".join(labels)
    for labels in [
        ("pypi", "org", "simple"),
        ("pypi", "org/simple"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("registry", "yarnpkg", "com"),
        ("deb", "debian", "org"),
        ("proxy", "golang", "org"),
    ]
]
# Somebody's home, ours or another's, and where this checkout lies.
MACHINE_PATHS = re.compile(
    "|".join(
        [r"(?<![\w.])/(?:home|Users)/\w+", rf"{re.escape(str(ROOT))}(?![\w-])"]
        + [rf"(?<![\w.]){re.escape(home)}/" for home in [os.environ.get("HOME", "").rstrip("/")] if home]
    )
)


@pytest.fixture(scope="module")
def texts(requires: Callable[[str], str]) -> dict[str, str]:
    """Give every tracked (or not ignored) text file of the repository by its path."""
    command = [requires("git"), "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return {str(path.relative_to(ROOT)): text for path in paths if path.is_file() and (text := text_of(path)) is not None}


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_no_file_names_a_package_registry(texts: dict[str, str]) -> None:
    assert [(path, host) for path, text in texts.items() for host in REGISTRIES if host in text] == []


def test_no_file_names_a_path_of_somebodys_machine(texts: dict[str, str]) -> None:
    assert [(path, found[0]) for path, text in texts.items() if (found := MACHINE_PATHS.search(text))] == []


def test_the_lock_holds_names_versions_and_hashes_only(texts: dict[str, str]) -> None:
    line = re.compile(r"#.*| {4}#.*|[a-z0-9][a-z0-9-]*==\S+( ; .+)? \\| {4}--hash=sha256:[0-9a-f]{64}( \\)?")
    assert [text for text in texts["requirements.lock"].splitlines() if not line.fullmatch(text)] == []


def test_the_public_names_are_exactly_those_that_are_visible() -> None:
    visible = {
        name for name, value in vars(streamkeep).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(streamkeep.__all__) == visible


def test_the_version_is_the_same_everywhere() -> None:
    released = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert released[1] == PROJECT["version"] == importlib.metadata.version("streamkeep")


def test_every_verb_that_the_documents_name_exists_and_contributing_names_every_verb() -> None:
    verbs = set(re.findall(r"^ {4}(\w+)\)$", (ROOT / "dev").read_text(), re.MULTILINE))
    usage = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True).stdout
    documents = [path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.exists()]
    named = {verb for path in documents for verb in re.findall(r"\./dev (\w+)", path.read_text())}
    contributing = set(re.findall(r"\./dev (\w+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert set(re.findall(r"^  (\w+) ", usage, re.MULTILINE)) == verbs
    assert contributing == verbs
    assert named <= verbs
