"""Make the site: `python -m website [DIRECTORY]`, by default `dist/site`. It ends with 1 where anything of it is wrong."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .checking import problems_of
from .llms import full_text, index_text
from .staging import ROOT, navigation, pages, stage

# What every site of ours has and begins with a dot: by it a site that was made before is known.
_MARKS = {".buildinfo", ".nojekyll"}


def main(arguments: list[str]) -> int:
    """Make the site in the directory that is named, and check it. Its Markdown is beside its pages."""
    parser = argparse.ArgumentParser(prog="./dev docs", description="Make the documentation site, and check it.")
    parser.add_argument(
        "directory", nargs="?", type=Path, default=ROOT / "dist/site", help="where it goes; dist/site if not given"
    )
    site = parser.parse_args(arguments).directory.resolve()
    if not may_be_replaced(site):
        parser.error(
            f"{site} has something else in it than a site that was made by this: name a new directory, or an empty one"
        )
    site.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place: there is never half a site, and nothing is removed but a site.
    with tempfile.TemporaryDirectory(prefix=".site-", dir=site.parent) as work:
        returncode = _make(Path(work))
        shutil.rmtree(site, ignore_errors=True)
        (Path(work) / "site").rename(site)
    problems = problems_of(site)
    for problem in problems:
        print(problem, file=sys.stderr)
    return returncode or bool(problems)


def may_be_replaced(site: Path) -> bool:
    """Say whether there is nothing at a path, or nothing but a site that was made before."""
    if not site.is_dir():
        return not site.exists()
    names = {path.name for path in site.iterdir()}
    return not names or {name for name in names if name.startswith(".")} == _MARKS


def _make(work: Path) -> int:
    site = work / "site"
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
    return made.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
