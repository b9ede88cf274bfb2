"""The documentation site: all pages are in its navigation, all public names in its reference; it works wherever it is put."""

import fcntl
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from website.checking import page_of, problems_of
from website.markdown import headings_of, targets_of
from website.reference import public_modules
from website.staging import navigation, pages, sections_of

ROOT = Path(__file__).parents[1]
# Their pages are lists of their own, which are made with the site.
LISTED_ELSEWHERE = ("docs/decisions/",)


@pytest.fixture(scope="module")
def all_pages() -> dict[str, str]:
    return pages()


def test_every_page_is_in_the_navigation_once() -> None:
    index = (ROOT / "docs/index.md").read_text()
    listed = [entry.page for section in sections_of(index) for entry in section.entries]
    sources = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
    wanted = {source.removeprefix("docs/") for source in sources if not source.startswith(LISTED_ELSEWHERE)}
    assert len(listed) == len(set(listed))
    # A page that is new has its line in docs/index.md.
    assert wanted - {"index.md"} - set(listed) == set()


def test_every_line_of_the_navigation_says_what_its_page_is_about() -> None:
    index = (ROOT / "docs/index.md").read_text()
    entries = [entry for section in sections_of(index) for entry in section.entries]
    assert len(entries) == len(re.findall(r"^- ", index, re.MULTILINE))
    assert [entry.page for entry in entries if len(entry.about) < 20] == []


def test_a_page_that_the_navigation_does_not_list_is_listed_at_its_end(all_pages: dict[str, str]) -> None:
    more = all_pages | {"how-to/new.md": "# What is new\n"}
    assert [(entry.title, entry.page) for entry in navigation(more)[-1].entries] == [("What is new", "how-to/new.md")]


def test_every_public_name_has_its_heading_in_the_reference_and_no_private_one_has(all_pages: dict[str, str]) -> None:
    for module in public_modules(ROOT / "src"):
        assert set(module.homes) == set(importlib.import_module(module.path).__all__)
        for name, home in module.homes.items():
            assert (2, name) in headings_of(all_pages[f"reference/{home}"])
    headings = [
        words for page, text in all_pages.items() if page.startswith("reference/streamkeep") for _, words in headings_of(text)
    ]
    assert [words for words in headings if re.search(r"(^|\.)_(?!_(aiter|iter|call)__$)", words)] == []


def test_every_module_that_a_page_imports_from_is_in_the_reference() -> None:
    public = {module.path: module for module in public_modules(ROOT / "src")}
    imports = [
        (module, name.strip().partition(" ")[0])
        for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
        for module, names in re.findall(r"^ *from (streamkeep[\w.]*) import ([^(#\n]+)", path.read_text(), re.MULTILINE)
        for name in names.split(",")
    ]
    assert [(module, name) for module, name in imports if module not in public or name not in public[module].homes] == []


def test_every_client_of_the_table_has_its_page() -> None:
    table = (ROOT / "docs/reference/clients.md").read_text()
    found = set(targets_of((ROOT / "docs/reference/find.md").read_text()))
    rows = re.findall(r"^\| \[[^|]*\]\(([^)]+)\) \|", table, re.MULTILINE)
    assert len(rows) > 15
    assert [target for target in rows if target not in found] == []


def test_what_is_wrong_with_a_site_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<html lang="en"><h1 id="a">A</h1><h3>Too deep</h3><img src="https://fonts.example/x.png">'
        '<a href="b.html">gone</a> <a href="#b">none</a> <a href="/a.html">root</a> <a href="http:/x">form</a></html>'
    )
    (tmp_path / "a.md").write_text("# A\n\n[gone](b.md) [none](#b)\n")
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.example/x.woff2) }")
    assert sorted(problems_of(tmp_path)) == [
        "a.css: loads from elsewhere",
        "a.html: #b has no such anchor",
        "a.html: /a.html leaves the site",
        "a.html: 1 images have no alternative text",
        "a.html: b.html is not there",
        "a.html: http:/x is no link",
        "a.html: https://fonts.example/x.png is not of this site",
        "a.html: its headings leave out a level: [1, 3]",
        "a.md: #b has no such heading",
        "a.md: b.md is not there",
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Give the site as `./dev docs` makes it, once for all processes that test."""
    pytest.importorskip("furo")
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "site/llms.txt").exists():
            made = subprocess.run(
                [sys.executable, "-m", "website", shared / "site"],
                cwd=ROOT,
                text=True,
                capture_output=True,
                timeout=280,
                check=False,
            )
            assert (made.returncode, made.stderr) == (0, "")
    return shared / "site"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_is_made_without_a_warning_and_every_link_in_it_leads_somewhere(site: Path, all_pages: dict[str, str]) -> None:
    assert problems_of(site) == []
    made = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in all_pages} <= made


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_page_has_its_markdown_beside_it_and_llms_txt_names_it(site: Path, all_pages: dict[str, str]) -> None:
    for page, text in all_pages.items():
        assert (site / page).read_text() == text
        html = page_of((site / page).with_suffix(".html").read_text())
        assert Path(page).name in html.assets
    listing = (site / "llms.txt").read_text()
    assert re.match(r"# streamkeep\n\n> .+\n\n", listing)
    assert [target for target in targets_of(listing) if not (site / target).is_file()] == []
    whole = (site / "llms-full.txt").read_text()
    assert [page for page in all_pages if f"<!-- {page} -->" not in whole] == []


@pytest.fixture
def page(requires: Callable[[str], str]) -> Iterator[Page]:
    """Give a page of Chromium's."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=requires("chromium"), args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_search_finds_a_page_from_a_file_without_any_host(site: Path, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.get_by_placeholder("Search").fill("gunicorn")
    page.get_by_placeholder("Search").press("Enter")
    page.locator("#search-results a", has_text="Flask").first.click()
    expect(page.locator("h1")).to_contain_text("Flask")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_works_below_a_path(site: Path, page: Page, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(site)
    failed: list[str] = []
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    with served(tmp_path) as address:
        page.goto(f"{address}/docs/index.html")
        page.locator(".sidebar-tree a", has_text="Writing").first.click()
        expect(page).to_have_url(f"{address}/docs/how-to/write.html")
        page.goto(f"{address}/docs/search.html?q=cursor")
        expect(page.locator("#search-results a").first).to_be_visible()
    assert failed == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(site: Path, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    wide = []
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        beyond = page.evaluate(
            "Math.max(...[document.documentElement, document.querySelector('.content')]"
            ".map(e => e.scrollWidth - e.clientWidth))"
        )
        if beyond > 0:
            wide.append((path.name, beyond))
    assert wide == []


@contextmanager
def served(directory: Path) -> Generator[str]:
    """Serve a directory's files at the address that is given."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(timeout=10)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
