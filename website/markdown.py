"""What the site's makers know of Markdown: where code is, what a heading's anchor is, what a link's target is."""

import re
from collections.abc import Callable, Iterator
from typing import Final

_FENCE: Final = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_HEADING: Final = re.compile(r"^(#{1,6}) (.*?)[ #]*$", re.MULTILINE)


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


def targets_of(text: str) -> Iterator[str]:
    """Give the targets of a text's links, in order."""
    return iter(_LINK.findall(_FENCE.sub("", text)))


def headings_of(text: str) -> Iterator[tuple[int, str]]:
    """Give the level and the words of each of a text's headings, in order."""
    return ((len(heading[1]), heading[2]) for heading in _HEADING.finditer(_FENCE.sub("", text)))


def title_of(text: str) -> str:
    """Give the words of a page's first heading, without their marks."""
    return next(re.sub(r"[`*]", "", words) for _, words in headings_of(text))


def anchor_of(heading: str) -> str:
    """Give the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
