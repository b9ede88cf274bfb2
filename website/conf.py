"""Sphinx's configuration of the site; `website.__main__` runs it."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "streamkeep"
author = "The authors of streamkeep"
project_copyright = "the authors of streamkeep, Apache 2.0"
html_title = "streamkeep"
extensions = ["myst_parser"]
root_doc = "index"
# Pages are what they are on a code host: of MyST's own syntax they have nothing but the trees that staging adds.
myst_disable_syntax = ["myst_role", "myst_block_break", "myst_line_comment", "myst_target", "substitution"]
myst_heading_anchors = 6
suppress_warnings = ["misc.highlighting_failure"]
html_theme = "furo"
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_permalinks_icon = "#"
html_static_path = [str(HERE / "static")]
templates_path = [str(HERE / "templates")]
html_css_files = ["site.css"]
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options: dict[str, list[str]] = {"footer_icons": [], "top_of_page_buttons": ["view"]}


def reachable(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: object) -> None:
    """Have what scrolls by itself be reached with the keyboard, and the navigation's headings say their level."""
    body = re.sub(r"<pre(?=[ >])", '<pre tabindex="0"', context.get("body", ""))
    context["body"] = re.sub(r'<div class="table-wrapper(?=[ "])', r'<div tabindex="0" class="table-wrapper', body)
    if tree := context.get("furo_navigation_tree"):
        context["furo_navigation_tree"] = tree.replace(' role="heading"', ' role="heading" aria-level="2"')


def setup(app: Sphinx) -> None:
    """Register it, after what the theme does to its pages."""
    app.connect("html-page-context", reachable, priority=900)
