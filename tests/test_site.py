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
from website.__main__ import main
from website.checking import page_of, problems_of
from website.llms import full_text
from website.markdown import anchors_of, headings_of, targets_of, unknown_in
from website.reference import public_modules, reference_pages
from website.staging import gone_from, navigation, pages, sections_of

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
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.example/x.woff2) } p { background: url('none.png') }")
    assert sorted(problems_of(tmp_path)) == [
        "a.css: https://fonts.example/x.woff2 is not of this site",
        "a.css: none.png is not there",
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


@pytest.mark.parametrize(
    "loading",
    [
        '<video src="https://host.example/x"></video>',
        '<video poster="//host.example/x"></video>',
        '<object data="https://host.example/x"></object>',
        '<img alt="x" srcset="https://host.example/x 2x">',
        '<link rel="preconnect" href="https://host.example/x">',
        '<svg><use href="https://host.example/x"></use></svg>',
        '<base href="https://host.example/x">',
        '<div style="background: url(https://host.example/x)"></div>',
        '<meta http-equiv="refresh" content="0; url=https://host.example/x">',
    ],
)
def test_whatever_a_page_loads_from_elsewhere_is_said(loading: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f'<html lang="en"><h1>A</h1>{loading}</html>')
    (said,) = problems_of(tmp_path)
    assert re.fullmatch(r"a\.html: (https:)?//host\.example/x is not of this site", said)


def test_what_a_keyboard_or_a_screen_reader_cannot_find_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<html lang="en"><p role="heading">A</p><h1 id="a">A</h1><pre>wide</pre><div id="a" class="table-wrapper"></div></html>'
    )
    assert problems_of(tmp_path) == [
        "a.html: more than one element has the id a",
        "a.html: 2 elements that may scroll cannot be reached with the keyboard",
        "a.html: 1 headings do not say their level",
    ]


def test_a_link_to_what_is_not_in_the_repository_is_said_not_taken_away() -> None:
    text = (
        "[a](gone.md) [b](../../src/streamkeep/gone.py#x) ![c](../images/gone.png) [two\nlines](gone2.md) [out](../../../x.md)"
    )
    there = " [d](write.md#errors) [e](../../src/streamkeep/events.py) [f](#here) [g](https://host.example/) `[h](gone.md)`"
    assert [said.partition(" ")[0] for said in gone_from(text + there, "docs/how-to/read.md")] == [
        "gone.md",
        "../../src/streamkeep/gone.py#x",
        "../images/gone.png",
        "gone2.md",
        "../../../x.md",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[a](b.md "title")',
        "[a](<b.md>)",
        "[a][b]",
        "[b]: b.md",
        "[a](b c.md)",
        '<a href="b.md">',
        "<br/>",
        "</div>",
        "<!DOCTYPE x>",
    ],
)
def test_markdown_that_the_sites_maker_does_not_know_is_said(text: str) -> None:
    assert list(unknown_in(f"# A\n\nSome words {text}" if "]:" not in text else f"# A\n\n{text}\n"))
    for code in (f"`{text}`", f"``` `{text}` ```", f"```text\n{text}\n```", f"- x\n\n  ```text\n  {text}\n  ```"):
        assert list(unknown_in(f"# A\n\n{code}\n")) == []


def test_links_and_comments_that_it_knows_are_not() -> None:
    text = "[a](b.md#c) ![d](e.png) <https://host.example/a?b> <name@host.example> <!-- said --> a < b > c [x] (y) `a[0]`"
    assert list(unknown_in(text)) == []


def test_headings_with_the_same_words_have_anchors_of_their_own() -> None:
    assert list(anchors_of("# Events\n\n## events\n\n```text\n# code\n```\n\n## Other\n\n## `Events`\n")) == [
        "events",
        "events-1",
        "other",
        "events-2",
    ]


def test_links_of_the_file_with_all_pages_lead_to_the_pages() -> None:
    all_pages = {
        "index.md": "# I\n\n[a](how-to/a.md)\n",
        "how-to/a.md": "# A\n\n[i](../index.md) [b](b.md#c) [own](#a) [e](https://x)\n",
    }
    assert list(targets_of(full_text([], all_pages))) == [
        "how-to/a.md",
        "index.md",
        "how-to/b.md#c",
        "how-to/a.md#a",
        "https://x",
    ]


def test_a_name_is_linked_to_its_own_description_where_another_differs_in_case_only(tmp_path: Path) -> None:
    source = package(
        tmp_path,
        '''class Feed:
    """What `feed` gives."""


def feed() -> Feed:
    """Give a `Feed`."""
    return Feed()
''',
    )
    page = reference_pages(source)["streamkeep.md"]
    assert "What [`feed`](#feed-1) gives." in page
    assert "Give a [`Feed`](#feed)." in page


@pytest.mark.parametrize(
    "docstring",
    [
        "Give it.\n\n    Needs much. Args:\n        a: b.",
        "Give it.\n\n    Raises:\n        ValueError: never.",
        "Give it.\n\n    Example:\n        feed()",
        "Give it.\n\n        with feed() as it:\n            pass",
        "Give it.\n\n    it = feed()\n\n    Then more.",
    ],
)
def test_a_docstring_of_which_a_page_would_show_code_or_a_section_as_prose_is_refused(docstring: str, tmp_path: Path) -> None:
    source = package(tmp_path, f'def feed() -> None:\n    """{docstring}\n    """\n')
    with pytest.raises(TypeError, match=r"streamkeep\.feed: "):
        reference_pages(source)


def package(directory: Path, text: str) -> Path:
    """Write a package of the reference's name with what each of its modules has to have."""
    names = re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE)
    (directory / "streamkeep").mkdir()
    (directory / "streamkeep/__init__.py").write_text(f'"""A package."""\n\n__all__ = {names}\n\n\n{text}')
    return directory


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "index.html", ".hidden"])
def test_a_directory_with_something_else_than_a_site_is_left_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path)])
    assert (refused.value.code, (tmp_path / name).read_text()) == (2, "mine")
    assert "name a new directory, or an empty one" in capsys.readouterr().err


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Give the site as `./dev docs` makes it, once for all processes that test."""
    pytest.importorskip("furo")
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "site/llms.txt").exists():
            (shared / ".site").mkdir()
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
def test_a_directory_that_is_named_as_the_site_with_a_dot_is_left_alone(site: Path) -> None:
    assert site.with_name(".site").is_dir()  # were the site `git`, this would be the repository
    assert [path.name for path in site.parent.glob(".site-*")] == []


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
def test_no_page_is_wider_than_the_window_or_asks_another_host(site: Path, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
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
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


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
