"""The page that shows what was measured: `docs/explanation/performance.md`, its table and its plots."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "explanation" / "performance.md"
IMAGES = DOCS / "images" / "performance"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
WIDTH, BAR, GAP, LABELS, VALUES = 720, 18, 8, 190, 90

Bars = Sequence[tuple[str, float]]


def write(table: Sequence[str], charts: Iterable[tuple[str, str, Bars]]) -> None:
    """Put a table and plots between the page's marks."""
    IMAGES.mkdir(exist_ok=True)
    shown: list[str] = []
    for number, (name, title, bars) in enumerate(charts, 1):
        image = IMAGES / f"{number}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"
        image.write_text(chart(title, bars))
        shown.append(f"![{title}](../images/performance/{image.name})")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n\n".join([f"{before}{BEGIN}", *shown, "\n".join(table), f"{END}{rest.partition(END)[2]}"]))


def chart(title: str, bars: Bars) -> str:
    """Draw bars, one below the other, each with its name and its value, as SVG."""
    most = max(value for _, value in bars) or 1.0
    height = 34 + len(bars) * (BAR + GAP)
    parts = [f'<text x="0" y="16" font-weight="bold">{escape(title)}</text>']
    for number, (name, value) in enumerate(bars):
        top, length = 28 + number * (BAR + GAP), (WIDTH - LABELS - VALUES) * value / most
        colour = "#9aa5b1" if name == "bare" else "#2f6f9f"
        parts += [
            f'<text x="{LABELS - 8}" y="{top + 13}" text-anchor="end">{escape(name.replace("`", ""))}</text>',
            f'<rect x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{LABELS + length + 6:.1f}" y="{top + 13}">{value:,.{0 if value >= 100 else 1}f}</text>',
        ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
    )
    style = (
        "<style>text{font:13px system-ui,sans-serif;fill:#1f2933}@media(prefers-color-scheme:dark){text{fill:#e4e7eb}}</style>"
    )
    return f'{head} aria-label="{escape(title)}">{style}{"".join(parts)}</svg>\n'
