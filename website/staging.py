"""What Sphinx is given: the pages of `docs/`, some from beside it, the reference, and a navigation made of `docs/index.md`."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from .markdown import targets_of, title_of, unknown_in, with_links
from .reference import reference_pages

ROOT: Final = Path(__file__).parent.parent
INDEX: Final = "index.md"
REFERENCE: Final = "reference/python.md"
DECISIONS: Final = "decisions/index.md"
_BESIDE: Final = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "README.md": INDEX,
    "docs/decisions": DECISIONS,
}
_ENTRY: Final = re.compile(r"^- \[(.+?)\]\((.+?)\): (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A page as `docs/index.md` lists it."""

    title: str
    page: str
    about: str


@dataclass(frozen=True, slots=True)
class Section:
    """A section of `docs/index.md`, and the pages that it lists."""

    title: str
    entries: tuple[Entry, ...]


def sections_of(index: str) -> list[Section]:
    """Give the navigation that the text of `docs/index.md` says; targets are as they are written there."""
    parts = re.split(r"^## (.+)$", index, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Section(title, tuple(Entry(*entry) for entry in _ENTRY.findall(text))) for title, text in pairs]


def pages() -> dict[str, str]:
    """Give the Markdown of all pages of the site, by their paths in it; links between them are relative.

    Raises SystemExit naming what links lead to nothing, and what is written in a way that no page may have.
    """
    docs = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))}
    beside = {source: (ROOT / source).read_text() for source in _BESIDE if source.endswith(".md") and source != "README.md"}
    sources = {**docs, **beside, "README.md": (ROOT / "README.md").read_text()}
    reference = {f"reference/{name}": text for name, text in reference_pages(ROOT / "src").items()}
    problems = [f"{source}: {problem}" for source, text in sources.items() for problem in gone_from(text, source)]
    problems += [
        f"{page}: {words} is no Markdown of ours"
        for page, text in {**sources, **reference}.items()
        for words in unknown_in(text)
    ]
    if problems:
        raise SystemExit("\n".join(problems))
    staged = {_place(source): _relinked(text, source) for source, text in (docs | beside).items()}
    decisions = [page for page in staged if page.startswith("decisions/") and page != DECISIONS]
    staged[REFERENCE] += _list("Modules", {name: _about(text) for name, text in reference.items()}, REFERENCE)
    staged[DECISIONS] += _list("All notes", dict.fromkeys(decisions, ""), DECISIONS, titles=staged)
    return staged | reference


def navigation(all_pages: dict[str, str]) -> list[Section]:
    """Give the sections of the site's navigation. Pages that none of them lists are in one of their own, at its end."""
    sections = sections_of(all_pages[INDEX])
    listed = {entry.page for section in sections for entry in section.entries}
    below = {page for page in all_pages if page.startswith(("decisions/", "reference/streamkeep."))}
    others = [page for page in all_pages if page not in listed | below | {INDEX}]
    if others:
        sections.append(Section("More", tuple(Entry(title_of(all_pages[page]), page, "") for page in others)))
    return sections


def stage(directory: Path, all_pages: dict[str, str]) -> None:
    """Write what Sphinx is given into a directory, which is emptied first."""
    shutil.rmtree(directory, ignore_errors=True)
    trees = {
        INDEX: "\n".join(_tree(section.title, [entry.page for entry in section.entries]) for section in navigation(all_pages))
    }
    for parent, prefix in [(REFERENCE, "reference/streamkeep"), (DECISIONS, "decisions/0")]:
        trees[parent] = _tree("", [os.path.relpath(page, Path(parent).parent) for page in all_pages if page.startswith(prefix)])
    for page, text in all_pages.items():
        path = directory / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + trees.get(page, ""))
    for path in ROOT.glob("docs/**/*"):
        if path.is_file() and path.suffix != ".md":
            copy = directory / path.relative_to(ROOT / "docs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _place(source: str) -> str:
    return _BESIDE.get(source) or source.removeprefix("docs/")


def gone_from(text: str, source: str) -> list[str]:
    """Say which links of a page lead to no file, and no directory, of the repository; of those the site would show the words only."""
    targets = [target for target in targets_of(text) if not re.match(r"#|[a-z]+:", target)]
    paths = {target: os.path.normpath(PurePosixPath(source).parent / target.partition("#")[0]) for target in targets}
    outside = {target for target, path in paths.items() if path.startswith(("..", "/"))}
    return [f"{target} is not there" for target, path in paths.items() if target in outside or not (ROOT / path).exists()]


def _relinked(text: str, source: str) -> str:
    """Give a page's text with its links as they are in the site. Of a link to a source file the words stay."""
    here = PurePosixPath(_place(source)).parent

    def relinked(target: str) -> str | None:
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return target
        found = os.path.normpath(PurePosixPath(source).parent / path)
        if found not in _BESIDE and not (found.startswith("docs/") and (ROOT / found).is_file()):
            return None
        return os.path.relpath(_place(found), here) + hash_ + anchor

    return with_links(text, relinked)


def _list(heading: str, about: dict[str, str], parent: str, titles: dict[str, str] | None = None) -> str:
    lines = []
    for page, words in about.items():
        title = f"`{PurePosixPath(page).stem}`" if titles is None else title_of(titles[page])
        lines.append(f"- [{title}]({os.path.relpath(page, PurePosixPath(parent).parent)})" + (f": {words}" if words else ""))
    return f"\n## {heading}\n\n" + "\n".join(lines) + "\n"


def _about(page: str) -> str:
    """Give the first paragraph of a page, its links left out."""
    paragraph = " ".join(page.split("\n\n")[1].split())
    return re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", paragraph)


def _tree(caption: str, entries: list[str]) -> str:
    return "\n".join(["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *entries, "```", ""])
