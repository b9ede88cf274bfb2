"""The site for programs that read text: `llms.txt` as llmstxt.org has it, and all pages in one file."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from .markdown import with_links
from .staging import INDEX, Section


def index_text(sections: Sequence[Section], pages: dict[str, str]) -> str:
    """Give `llms.txt`: what the index says, and each page with what it is about. Its links are relative."""
    opening = pages[INDEX].partition("\n## ")[0].rstrip()
    lists = [
        "\n".join(
            [f"## {section.title}", "", *(f"- [{entry.title}]({entry.page}): {entry.about}" for entry in section.entries)]
        )
        for section in sections
    ]
    rest = "## Optional\n\n- [All pages in one file](llms-full.txt): what is listed above, whole, and the reference"
    return "\n\n".join([opening, *lists, rest]) + "\n"


def full_text(sections: Sequence[Section], pages: dict[str, str]) -> str:
    """Give all pages, in the order of the navigation, then those below them; each begins with a line that names it.

    Links lead to the pages as they are beside this file.
    """
    first = [INDEX, *(entry.page for section in sections for entry in section.entries)]
    order = dict.fromkeys([*first, *pages])
    return "\n".join(f"<!-- {page} -->\n\n{_from_root(pages[page], page)}" for page in order)


def _from_root(text: str, page: str) -> str:
    def relinked(target: str) -> str:
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            return target
        return (os.path.normpath(PurePosixPath(page).parent / path) if path else page) + hash_ + anchor

    return with_links(text, relinked)
