"""What we would publish, installed into clean environments: alone, with each extra alone, and with all; and used there."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import metadata
from pathlib import Path
from typing import Final

import anyio
import pytest
from tests.engines.process import Process, answers, free_port
from tests.engines.running import ENGINES
from tests.package.environments import ALL, ROOT, Workshop, extras_of, modules_of
from tests.test_docs import ASKING, PAGES, blocks, is_program, name_of, named_files

from streamkeep import StreamManager

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROGRAMS: Final = Path(__file__).with_name("programs")
EXTRAS: Final = sorted(metadata("streamkeep").get_all("Provides-Extra") or [])
OPTIONAL: Final = sorted(
    {
        re.split(r"[^\w-]", need)[0]
        for need in metadata("streamkeep").get_all("Requires-Dist") or []
        if "extra ==" in need and not need.startswith("streamkeep")
    }
    | {"hiredis", "pydantic", "sse-starlette", "starlette"}  # what they bring and we import
)
MODULE_OF: Final = {
    "a2a-sdk": "a2a",
    "genkit-fastapi": "genkit_fastapi",
    "opentelemetry-api": "opentelemetry",
    "sse-starlette": "sse_starlette",
}
IMPORTS: Final = Path(__file__).with_name("imports.py")
MISSING: Final = re.compile(r"ModuleNotFoundError: .+ needs \w+, which is not installed: pip install 'streamkeep\[([\w-]+)\]'")
INSTALLS: Final = re.compile(r"pip install (?!-)([^`\n]+)")
SHOWN: Final = [page for page in PAGES if page not in ASKING and any(map(is_program, blocks(page)))]


@pytest.mark.parametrize("extra", [None, *EXTRAS, ALL])
def test_each_module_is_imported_without_a_warning_or_says_which_extra_it_needs(extra: str | None, workshop: Workshop) -> None:
    environment = workshop.environment(*[extra] if extra else [])
    assert list(environment.imported) == list(modules_of(workshop.built().wheel))
    said = {module: error for module, error in environment.imported.items() if error is not None}
    assert [text for text in said.values() if not MISSING.fullmatch(text)] == []
    if extra == ALL:
        assert said == {}


def test_the_extra_that_a_module_names_is_the_one_that_it_needs(workshop: Workshop) -> None:
    named = {module: named_in(error) for module, error in workshop.environment().imported.items() if error is not None}
    assert set(named.values()) <= set(extras_of(workshop.built().wheel))
    assert [module for module, extra in named.items() if workshop.environment(extra).imported[module] is not None] == []


@pytest.mark.parametrize("package", OPTIONAL)
def test_where_one_package_alone_is_missing_a_module_that_needs_it_says_which_extra_brings_it(
    package: str, workshop: Workshop, tmp_path: Path
) -> None:
    """`redis` without `hiredis`, say, which somebody has installed by hand."""
    modules = modules_of(workshop.built().wheel)
    said = workshop.environment(ALL).run(IMPORTS, "--without", MODULE_OF.get(package, package), *modules, cwd=tmp_path)
    assert [error for error in json.loads(said).values() if error is not None and not MISSING.fullmatch(error)] == []


def test_what_needs_no_other_package_is_imported_without_one(workshop: Workshop) -> None:
    imported = workshop.environment().imported
    alone = ("http", "sync", "wire", "cli", "storages.memory", "storages.sqlite", "storages.nats")
    sdks = ("anthropic", "google_genai", "openai", "openai_agents", "openai_sdk", "pydantic_ai")
    wanted = ["streamkeep", *(f"streamkeep.{name}" for name in alone), *(f"streamkeep.integrations.{name}" for name in sdks)]
    assert [module for module in wanted if imported[module] is not None] == []


@pytest.mark.parametrize("extra", ["base", *EXTRAS, ALL])
def test_a_small_program_runs_with_nothing_but_the_extra(extra: str, workshop: Workshop, tmp_path: Path) -> None:
    environment = workshop.environment(*[] if extra == "base" else [extra])
    with ARGUMENTS.get(extra, nothing)(tmp_path) as arguments:
        name = "use_storage.py" if extra in {"nats", "postgres", "redis"} else f"use_{extra}.py"
        assert (PROGRAMS / name).exists(), f"the extra {extra} has no program yet that uses it: write {name}"
        environment.run(PROGRAMS / name, *arguments, cwd=tmp_path)


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_what_a_page_has_one_install_is_enough_for_its_programs(page: Path, workshop: Workshop, tmp_path: Path) -> None:
    extras, beside = installs_of(page)
    environment = workshop.environment(*extras, beside=beside)
    for number, block in enumerate(filter(is_program, blocks(page))):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name, text in named_files(page).items():
            (directory / name).write_text(text)
        if "def test_" in block:
            (directory / "test_shown.py").write_text(block)
            (directory / "none.ini").write_text("[pytest]\n")
            command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "none.ini", "--rootdir", ".", "test_shown.py"]
        else:
            command = ["-c", block]
        environment.run(*command, cwd=directory, OPENAI_API_KEY="none")


def test_what_the_deployed_example_requires_is_enough_for_it(workshop: Workshop, tmp_path: Path) -> None:
    example = ROOT / "examples/deploy"
    ours, *beside = (example / "requirements.txt").read_text().splitlines()
    extras = re.findall(r"\w+", ours.partition("[")[2].partition("]")[0])
    shutil.copy(example / "app.py", tmp_path)
    program = "import app, uvicorn; assert app.streams_http.streams"
    workshop.environment(*extras, beside=beside).run("-c", program, cwd=tmp_path, STREAMS_URL="postgresql://host/database")


def named_in(error: str) -> str:
    found = MISSING.fullmatch(error)
    assert found is not None, error
    return found[1]


def installs_of(page: Path) -> tuple[list[str], list[str]]:
    """Give the extras, and the other packages, that a page has one install, comments behind its commands included."""
    extras: set[str] = set()
    beside: set[str] = set()
    for line in INSTALLS.findall(page.read_text()):
        packages, _, comment = line.partition("#")
        for name in [
            *shlex.split(packages),
            *re.findall(r'"(streamkeep\[.+?\])"', comment),
            *re.findall(r"\bpytest\b", comment),
        ]:
            if ours := re.fullmatch(r"streamkeep(?:\[([\w,-]+)\])?", name):
                extras.update(ours[1].split(",") if ours[1] else [])
            else:
                beside.add(name)
    return sorted(extras), sorted(beside)


async def write_a_stream(url: str) -> None:
    async with StreamManager.connect(url) as streams, streams.open("answer") as stream:
        await stream.write("Nothing is lost")
        await stream.done()


@contextmanager
def nothing(_directory: Path) -> Generator[list[str]]:
    yield []


@contextmanager
def a_port(_directory: Path) -> Generator[list[str]]:
    yield [str(free_port())]


@contextmanager
def a_stream_of_a_server(directory: Path) -> Generator[list[str]]:
    port, url = free_port(), f"sqlite:///{directory / 'served.db'}"
    anyio.run(write_a_stream, url)
    command = [sys.executable, "-m", "streamkeep.cli", "serve", "--storage", url, "--port", str(port)]
    with Process(command, directory / "server", lambda: answers(port)):
        yield [f"http://127.0.0.1:{port}/streams/answer"]


def an_engine(name: str) -> Callable[[Path], AbstractContextManager[list[str]]]:
    @contextmanager
    def running(_directory: Path) -> Generator[list[str]]:
        with ENGINES[name]() as empty:
            yield [empty().url]

    return running


ARGUMENTS: Final[dict[str, Callable[[Path], AbstractContextManager[list[str]]]]] = {
    "cli": a_port,
    "client": a_stream_of_a_server,
    **{name: an_engine(name) for name in ("nats", "postgres", "redis")},
}
