"""Make the site: `python -m website [DIRECTORY]`, by default `dist/site`. It ends with 1 where anything of it is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

from .checking import problems_of
from .llms import full_text, index_text
from .staging import ROOT, navigation, pages, stage


def main(arguments: list[str]) -> int:
    """Make the site in the directory that is named, and check it. Its Markdown is beside its pages."""
    site = Path(arguments[0]) if arguments else ROOT / "dist/site"
    shutil.rmtree(site, ignore_errors=True)
    work = site.parent / f".{site.name}"
    all_pages = pages()
    stage(work / "pages", all_pages)
    sphinx = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--fresh-env", "--quiet"]
    places = ["--conf-dir", str(Path(__file__).parent), "--doctree-dir", str(work / "trees"), str(work / "pages"), str(site)]
    made = subprocess.run([*sphinx, "--jobs", "auto", *places], check=False)
    shutil.copytree(work / "pages", site, dirs_exist_ok=True)  # what the Markdown links to is where it says
    for page, text in all_pages.items():
        (site / page).write_text(text)
    (site / "llms.txt").write_text(index_text(navigation(all_pages), all_pages))
    (site / "llms-full.txt").write_text(full_text(navigation(all_pages), all_pages))
    (site / ".nojekyll").touch()  # a host that is GitHub's would leave out directories that begin with an underscore
    problems = problems_of(site)
    for problem in problems:
        print(problem, file=sys.stderr)
    shutil.rmtree(work)
    return made.returncode or bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
