"""Sphinx's configuration of the site; `website.__main__` runs it."""

from pathlib import Path

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
