"""What a site must be, looked at as it was made.

Each link and each anchor leads somewhere in it, nothing is loaded from elsewhere, and headings are in order.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from .markdown import anchor_of, headings_of, targets_of

_ASSETS: Final = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("link", "href"), ("image", "href")}
_EXTERNAL: Final = re.compile(r"https?://([\w-]+\.)*[\w-]+(:\d+)?(/\S*)?|mailto:\S+@\S+")
_FROM_ELSEWHERE: Final = re.compile(r"""url\(\s*["']?(https?:)?//|@import\s+["'](https?:)?//""")


@dataclass(slots=True)
class Page:
    """What of a page's HTML is looked at."""

    ids: set[str] = field(default_factory=set[str])
    links: list[str] = field(default_factory=list[str])
    assets: list[str] = field(default_factory=list[str])
    headings: list[int] = field(default_factory=list[int])
    images_without_words: int = 0
    language: str = ""
    title: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.page.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        for name, value in given.items():
            if (tag, name) in _ASSETS:
                self.page.assets.append(value)
        if re.fullmatch("h[1-6]", tag):
            self.page.headings.append(int(tag[1]))
        if tag == "img" and not given.get("alt"):
            self.page.images_without_words += 1
        if tag == "html":
            self.page.language = given.get("lang", "")


def page_of(html: str) -> Page:
    """Give what is looked at of a page."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.page


def problems_of(site: Path) -> list[str]:
    """Give what is wrong with the site in a directory, a sentence each; nothing, if all is well."""
    pages = {path: page_of(path.read_text()) for path in sorted(site.rglob("*.html"))}
    problems = [f"{path.relative_to(site)}: {problem}" for path in pages for problem in _problems(path, pages, site.resolve())]
    problems += [
        f"{path.relative_to(site)}: {problem}" for path in sorted(site.rglob("*.md")) for problem in _twin_problems(path)
    ]
    styles = [*site.rglob("*.css")]
    return problems + [
        f"{path.relative_to(site)}: loads from elsewhere" for path in styles if _FROM_ELSEWHERE.search(path.read_text())
    ]


def _problems(path: Path, pages: Mapping[Path, Page], site: Path) -> Iterator[str]:
    page = pages[path]
    for link in page.links:
        yield from _link_problems(link, path, pages, site)
    for asset in page.assets:
        parts = urlsplit(asset)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc or asset.startswith("/"):
            yield f"{asset} is not of this site"
        elif parts.path and not (path.parent / unquote(parts.path)).is_file():
            yield f"{asset} is not there"
    # The page of search results has none before there are results.
    if (path.name != "search.html" and page.headings[:1] != [1]) or page.headings.count(1) > 1:
        yield f"its headings do not begin with one of the first level: {page.headings}"
    if any(after > before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False)):
        yield f"its headings leave out a level: {page.headings}"
    if page.images_without_words:
        yield f"{page.images_without_words} images have no alternative text"
    if not page.language:
        yield "its language is not said"


def _link_problems(link: str, path: Path, pages: Mapping[Path, Page], site: Path) -> Iterator[str]:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        if not _EXTERNAL.fullmatch(link):
            yield f"{link} is no link"
        return
    target = path if not parts.path else (path.parent / unquote(parts.path))
    if link.startswith("/") or not target.resolve().is_relative_to(site):
        yield f"{link} leaves the site"
    elif not target.is_file():
        yield f"{link} is not there"
    elif parts.fragment and target.suffix == ".html":
        anchored = pages[_normal(target)]
        if unquote(parts.fragment) not in anchored.ids:
            yield f"{link} has no such anchor"


def _twin_problems(path: Path) -> Iterator[str]:
    for link in targets_of(path.read_text()):
        target, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        there = path.parent / target if target else path
        if not there.is_file():
            yield f"{link} is not there"
        elif anchor and anchor not in {anchor_of(words) for _, words in headings_of(there.read_text())}:
            yield f"{link} has no such heading"
    if not path.with_suffix(".html").is_file():
        yield "it has no page"


def _normal(path: Path) -> Path:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)
