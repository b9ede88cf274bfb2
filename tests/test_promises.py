"""docs/explanation/promises.md and the tests say the same: every promise is owned, and every owner exists and is marked."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/explanation/promises.md"
SUITE = ROOT / "src/streamkeep/testing/_streams_suite.py"
PROMISES = [f"P{number}" for number in range(1, 29)]


@cache
def listed() -> Mapping[str, set[str]]:
    """Give the tests that the page lists under each promise."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        found[section.split(maxsplit=1)[0]] = set(re.findall(r"^- `(.+)`$", section, re.MULTILINE))
    return found


@cache
def marked() -> Mapping[str, set[str]]:
    """Give the tests that say, each with a mark, which promises they own."""
    found = defaultdict(set)
    for name, test in every_test():
        for mark in test.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func).split(".")[-1] == "promise":
                for id_ in mark.args:
                    found[ast.literal_eval(id_)].add(name)
    return found


def every_test() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        for test in functions(path):
            yield f"{path.relative_to(ROOT)}::{test.name}", test
    for test in functions(SUITE):
        yield f"StreamsSuite::{test.name}", test


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def test_the_page_has_all_promises_in_order() -> None:
    assert list(listed()) == PROMISES


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_owned_by_the_tests_that_say_so(promise: str) -> None:
    assert listed()[promise] == marked()[promise] != set()


def test_no_test_owns_a_promise_that_nobody_made() -> None:
    assert marked().keys() == listed().keys()
