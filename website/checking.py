"""What a site must be, looked at as it was made.

Each link and each anchor leads somewhere in it, nothing is loaded from elsewhere, headings are in order, and what scrolls can be
reached with the keyboard.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from .markdown import anchors_of, targets_of

_ASSETS: Final = {"src", "poster", "data", "background", "xlink:href"}
"""Attributes that have a browser load something, whatever has them; beside `href`, but for links that are followed by hand."""
_EXTERNAL: Final = re.compile(r"https?://([\w-]+\.)*[\w-]+(:\d+)?(/\S*)?|mailto:\S+@\S+")
_LOADED: Final = re.compile(r"""url\(\s*["']?([^"')]+?)["']?\s*\)|@import\s+["']([^"']+)["']""")


@dataclass(slots=True)
class Page:
    """What of a page's HTML is looked at."""

    ids: set[str] = field(default_factory=set[str])
    links: list[str] = field(default_factory=list[str])
    assets: list[str] = field(default_factory=list[str])
    headings: list[int] = field(default_factory=list[int])
    twice: list[str] = field(default_factory=list[str])
    unreachable: int = 0
    headings_without_level: int = 0
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
            if given["id"] in self.page.ids:
                self.page.twice.append(given["id"])
            self.page.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        self.page.assets += assets_of(tag, given)
        if re.fullmatch("h[1-6]", tag):
            self.page.headings.append(int(tag[1]))
        if tag == "img" and not given.get("alt"):
            self.page.images_without_words += 1
        if tag == "html":
            self.page.language = given.get("lang", "")
        is_wide = tag == "pre" or "table-wrapper" in given.get("class", "").split()
        self.page.unreachable += is_wide and "tabindex" not in given
        self.page.headings_without_level += given.get("role") == "heading" and "aria-level" not in given


def assets_of(tag: str, given: Mapping[str, str]) -> list[str]:
    """Give what an element has a browser load."""
    assets = [value for name, value in given.items() if name in _ASSETS or (name == "href" and tag not in {"a", "area"})]
    assets += [candidate.split()[0] for candidate in given.get("srcset", "").split(",") if candidate.strip()]
    if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
        assets.append(given.get("content", "").partition("=")[2])
    return assets + loaded_by(given.get("style", ""))


def loaded_by(style: str) -> list[str]:
    """Give what a text in CSS has a browser load."""
    return [url or name for url, name in _LOADED.findall(style)]


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
    problems += [
        f"{path.relative_to(site)}: {problem}" for path in sorted(site.glob("llms*.txt")) for problem in _text_problems(path)
    ]
    return problems + [
        f"{path.relative_to(site)}: {problem}"
        for path in sorted(site.rglob("*.css"))
        for asset in loaded_by(path.read_text())
        for problem in _asset_problems(asset, path)
    ]


def _problems(path: Path, pages: Mapping[Path, Page], site: Path) -> Iterator[str]:
    page = pages[path]
    for link in page.links:
        yield from _link_problems(link, path, pages, site)
    for asset in page.assets:
        yield from _asset_problems(asset, path)
    if page.twice:
        yield f"more than one element has the id {', '.join(page.twice)}"
    if page.unreachable:
        yield f"{page.unreachable} elements that may scroll cannot be reached with the keyboard"
    if page.headings_without_level:
        yield f"{page.headings_without_level} headings do not say their level"
    # The page of search results has none before there are results.
    if (path.name != "search.html" and page.headings[:1] != [1]) or page.headings.count(1) > 1:
        yield f"its headings do not begin with one of the first level: {page.headings}"
    if any(after > before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False)):
        yield f"its headings leave out a level: {page.headings}"
    if page.images_without_words:
        yield f"{page.images_without_words} images have no alternative text"
    if not page.language:
        yield "its language is not said"


def _asset_problems(asset: str, path: Path) -> Iterator[str]:
    parts = urlsplit(asset)
    if parts.scheme == "data":
        return
    if parts.scheme or parts.netloc or asset.startswith("/"):
        yield f"{asset} is not of this site"
    elif parts.path and not (path.parent / unquote(parts.path)).is_file():
        yield f"{asset} is not there"


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
    yield from _text_problems(path)
    if not path.with_suffix(".html").is_file():
        yield "it has no page"


def _text_problems(path: Path) -> Iterator[str]:
    for link in targets_of(path.read_text()):
        target, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        there = path.parent / target if target else path
        if not there.is_file():
            yield f"{link} is not there"
        elif anchor and anchor not in anchors_of(there.read_text()):
            yield f"{link} has no such heading"


def _normal(path: Path) -> Path:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)
