"""What is in the wheel and in the sdist, what they say of themselves, and that whoever builds them again has the same bytes."""

import ast
import base64
import csv
import re
import subprocess
import tarfile
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata
from tests.package.environments import ROOT, Workshop, build, metadata_of, modules_of, names_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def sources(requires: Callable[[str], str]) -> set[str]:
    """Give the files of the package that are tracked, or would be."""
    command = [
        requires("git"),
        "-c",
        f"safe.directory={ROOT}",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "src",
    ]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return {name.removeprefix("src/") for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_has_the_package_its_licence_and_nothing_else(workshop: Workshop, sources: set[str]) -> None:
    about = f"streamkeep-{version('streamkeep')}.dist-info"
    ours = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD")}
    assert set(names_in(workshop.built().wheel)) == sources | ours
    assert "streamkeep/py.typed" in sources
    assert [name for name in sources if "test" in Path(name).name or "/tests/" in name] == []  # `testing` has suites, no tests


def test_the_sdist_has_what_builds_the_wheel_and_no_tests(workshop: Workshop, sources: set[str]) -> None:
    with tarfile.open(workshop.built().sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = {"pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"}
    assert names == beside | {f"src/{name}" for name in sources}


def test_the_sdist_builds_the_wheel_that_the_checkout_builds_and_both_are_the_same_bytes_each_time(
    workshop: Workshop, tmp_path: Path
) -> None:
    built = workshop.built()
    (straight,) = build(tmp_path / "wheel", only="wheel")
    again = build(tmp_path / "again")
    assert straight.read_bytes() == built.wheel.read_bytes()
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in sorted([built.wheel, built.sdist])]


def test_a_packager_may_say_when_it_was_built(tmp_path: Path) -> None:
    one, two = ([path.read_bytes() for path in build(tmp_path / name, epoch="1700000000")] for name in ("one", "two"))
    assert one == two
    with ZipFile(next((tmp_path / "one").glob("*.whl"))) as archive:
        assert {entry.date_time[0] for entry in archive.infolist()} == {2023}


def test_the_metadata_are_valid_and_say_what_an_index_shows(workshop: Workshop) -> None:
    said = Metadata.from_email(metadata_of(workshop.built().wheel))
    assert (said.name, str(said.version), said.license_expression) == ("streamkeep", version("streamkeep"), "Apache-2.0")
    assert said.license_files == ["LICENSE"]
    assert said.description_content_type == "text/markdown"
    assert said.description == (ROOT / "README.md").read_text()
    assert said.summary
    assert str(said.requires_python) == ">=3.11"
    assert said.requires_dist is not None
    assert {need.name for need in said.requires_dist if need.marker is None} == {"anyio", "msgspec"}


def test_the_record_has_each_file_with_its_hash(workshop: Workshop) -> None:
    with ZipFile(workshop.built().wheel) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith("/RECORD")]
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert sorted(name for name, _, _ in rows) == sorted(archive.namelist())
        for name, said, _ in rows:
            if name != record:
                digest = base64.urlsafe_b64encode(sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert said == f"sha256={digest}", name


def test_every_public_name_is_there_and_documented(workshop: Workshop) -> None:
    undocumented = [
        f"{module}.{name}" for module in modules_of(workshop.built().wheel) for name in undocumented_in(source_of(module))
    ]
    assert undocumented == []


def source_of(module: str) -> ast.Module:
    path = ROOT / "src" / module.replace(".", "/")
    return ast.parse((path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py").read_text())


def undocumented_in(module: ast.Module) -> list[str]:
    """Give the public classes and functions that a module defines and says nothing about, and `` if it says nothing of itself."""
    defined = [node for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    overloads = {node.name for node in defined if any(ast.unparse(mark) == "overload" for mark in node.decorator_list)}
    said = {node.name for node in defined if ast.get_docstring(node)}
    names = {node.name for node in defined if not node.name.startswith("_")} | overloads
    return [name for name in sorted(names) if name not in said] + ([] if ast.get_docstring(module) else [""])


def test_no_page_file_is_of_somebody_else(workshop: Workshop) -> None:
    """What a browser is given is ours, under the package's licence; what is bundled from elsewhere would name its licence."""
    pages = [name for name in names_in(workshop.built().wheel) if Path(name).suffix in {".js", ".css", ".html", ".svg"}]
    assert pages
    foreign = re.compile(
        r"@license|@preserve|copyright|sourceMappingURL|https?://(?!www\.w3\.org/|127\.0\.0\.1|localhost)", re.IGNORECASE
    )
    with ZipFile(workshop.built().wheel) as archive:
        assert [(name, found[0]) for name in pages if (found := foreign.search(archive.read(name).decode()))] == []
