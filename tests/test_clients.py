"""docs/reference/clients.md and the tests say the same: each cell of its table is shown by tests, and each of those is in the table."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/clients.md"
NONE = "–"
"""What a cell says where a client has no such thing."""

Cell = tuple[str, str]


@cache
def table() -> Mapping[Cell, str]:
    """Give what each cell says, by its column and its client."""
    head, _, *rows = [
        [plain(cell) for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("|")
    ]
    return {(column, row[0]): text for row in rows for column, text in zip(head[1:], row[1:], strict=True)}


def plain(text: str) -> str:
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("`", "").strip()


@cache
def marked() -> Mapping[Cell, set[str]]:
    """Give the tests that say, each with a mark, which cells they show."""
    found = defaultdict(set)
    for name, test in every_test():
        for mark in test.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.cell":
                column, *clients = [ast.literal_eval(argument) for argument in mark.args]
                for client in clients:
                    found[column, client].add(name)
    return found


def every_test() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in [*sorted(ROOT.glob("tests/**/test_*.py")), *sorted(ROOT.glob("tests/**/*_suite.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield f"{path.relative_to(ROOT)}::{node.name}", node


def test_each_cell_is_shown_by_a_test_and_none_says_nothing() -> None:
    assert {cell for cell, text in table().items() if text != NONE} == set(marked())
    assert "" not in table().values()


def test_no_client_is_there_twice() -> None:
    clients = re.findall(r"^\| (?!client|-)(.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert len(clients) == len(set(map(plain, clients))) == len({client for _, client in table()})


def test_each_word_of_a_cell_is_explained() -> None:
    explained = set(re.findall(r"^- \*\*(.*?)\*\*", PAGE.read_text(), re.MULTILINE))
    assert set(table().values()) - {NONE} <= explained


def test_no_page_has_a_second_table() -> None:
    pages = [
        page for page in ROOT.glob("docs/**/*.md") if re.search(r"^\|.*second tab.*Stop.*\|$", page.read_text(), re.MULTILINE)
    ]
    assert pages == [PAGE]
