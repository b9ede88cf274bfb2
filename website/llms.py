"""The site for programs that read text: `llms.txt` as llmstxt.org has it, and all pages in one file."""

from collections.abc import Sequence

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
    """Give all pages, in the order of the navigation, then those below them; each begins with a line that names it."""
    first = [INDEX, *(entry.page for section in sections for entry in section.entries)]
    order = dict.fromkeys([*first, *pages])
    return "\n".join(f"<!-- {page} -->\n\n{pages[page]}" for page in order)
