"""Take the picture of the demo that the README shows: python -m tests.demo.screenshot docs/images/demo.png."""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect, sync_playwright
from tests.demo.conftest import ARGUMENTS
from tests.demo.server import Demo

SIZE = 200_000


def play(context: BrowserContext, page: Page) -> None:
    """Have a second window and a slow reader, cut the connection, and come back."""
    page.get_by_role("button", name="Ask", exact=True).click()
    wait_for_offset(page, 40)
    with context.expect_page():
        page.get_by_role("link", name="Second window").click()
    page.bring_to_front()  # a window behind another draws nothing
    page.get_by_role("button", name="Add a slow reader").click()
    page.get_by_role("combobox", name="The same answer in").select_option("ai-sdk")
    wait_for_offset(page, 215)
    page.get_by_role("button", name="Cut the connection").click()
    expect(page.locator("#detail")).to_contain_text(re.compile(r": [4-9]\d events to catch up on"))
    page.get_by_role("button", name="Reconnect").click()
    expect(page.locator("#log")).to_contain_text("missed events at once")
    wait_for_offset(page, 340)


def wait_for_offset(page: Page, offset: int) -> None:
    page.wait_for_function("least => parseInt(document.title) >= least", arg=offset)


def main(path: Path) -> None:
    """Take it, in a new browser, of a new demo."""
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        with Demo(f"sqlite:///{directory}/streams.db", sys.stderr, tokens_per_second=30) as demo:
            page.goto(demo.url)
            play(context, page)
            page.screenshot(path=path)
        browser.close()
    assert path.stat().st_size < SIZE


if __name__ == "__main__":
    main(Path(sys.argv[1]))
