"""What the site's makers know of Markdown: where code is, what a heading's anchor is, what a link's target is."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

_FENCE: Final = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_FENCE_IN_LIST: Final = re.compile(r"^( +)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_LINK: Final = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_HEADING: Final = re.compile(r"^(#{1,6}) (.*?)[ #]*$", re.MULTILINE)
_OTHER_LINK: Final = re.compile(r"\]\((?![^)\s]+\))[^)]*\)?|(?<=\S)\]\[[^\]]*\]|^ {0,3}\[[^\]]+\]:.*$", re.MULTILINE)
_HTML: Final = re.compile(r"<(?!!--)[A-Za-z/!?](?![a-z]*:)(?![^\s<>]*@)[^>\n]*>")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Give the text with whatever `change` makes of what is between its fences."""
    parts = []
    end = 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def with_links(text: str, change: Callable[[str], str | None]) -> str:
    """Give the text with whatever `change` makes of the targets of its links; None leaves of a link only its words."""

    def changed(prose: str) -> str:
        targets = {target: change(target) for target in _LINK.findall(prose)}
        for target, new in targets.items():
            if new is None:
                prose = re.sub(rf"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\({re.escape(target)}\)", r"\1", prose)
        return _LINK.sub(lambda target: targets.get(target[1]) or target[1], prose)

    return outside_code(text, changed)


def prose_of(text: str) -> str:
    """Give the text without its code: fences are left out, those in lists too, and of code within a line only its marks stay."""
    return _SPAN.sub("``", _FENCE_IN_LIST.sub("", _FENCE.sub("", text)))


def targets_of(text: str) -> Iterator[str]:
    """Give the targets of a text's links, in order."""
    return iter(_LINK.findall(prose_of(text)))


def unknown_in(text: str) -> Iterator[str]:
    """Give what of a text the site's makers would not understand: links in other forms than `[words](target)`, and HTML."""
    prose = prose_of(text)
    yield from (link[0] for link in _OTHER_LINK.finditer(prose))
    yield from (tag[0] for tag in _HTML.finditer(prose))


def headings_of(text: str) -> Iterator[tuple[int, str]]:
    """Give the level and the words of each of a text's headings, in order."""
    return ((len(heading[1]), heading[2]) for heading in _HEADING.finditer(_FENCE.sub("", text)))


def title_of(text: str) -> str:
    """Give the words of a page's first heading, without their marks."""
    return next(re.sub(r"[`*]", "", words) for _, words in headings_of(text))


def anchor_of(heading: str) -> str:
    """Give the anchor of a heading, as GitHub makes it of one that is alone with its words."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors_of(text: str) -> Mapping[str, str]:
    """Give the words of a text's headings by their anchors: of those that would have the same one, later ones are numbered."""
    seen: Counter[str] = Counter()
    anchors = {}
    for _, words in headings_of(text):
        anchor = anchor_of(words)
        anchors[f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor] = words
        seen[anchor] += 1
    return anchors
