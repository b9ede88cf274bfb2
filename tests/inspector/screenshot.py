"""Take the pictures that docs/how-to/inspector.md shows: python -m tests.inspector.screenshot docs/images."""

import random
import shutil
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright
from tests.demo.conftest import ARGUMENTS
from tests.inspector.command import InspectCommand

from streamkeep import PublicError
from streamkeep.demo import TEXT
from streamkeep.sync import StreamManager

SIZE = 200_000
SEED = 7
WORDS = TEXT.split(" ")


def fill(streams: StreamManager, chance: random.Random) -> None:
    """Store streams that have ended, in different ways."""
    for number in range(90):
        owner = chance.choice(["ann", "bob", "carla", "dmitri"])
        with streams.open(f"answer-{chance.randrange(16**8):08x}", owner=owner, key=f"chat-{number}") as stream:
            for word in WORDS[: chance.randrange(3, 40)]:
                stream.write_soon({"text": f"{word} "})
            if number % 9 == 4:
                stream.error(PublicError("RESOURCE_EXHAUSTED", "the budget is used up"))
            else:
                stream.done()


def answer(streams: StreamManager, chance: random.Random, stop: threading.Event) -> None:
    """Write an answer at the pace of a model, with a wait now and then, until told to stop."""
    with streams.open("answer-0a41c7f2", owner="ann", key="chat-42", metadata={"model": "alice-1", "route": "/chat"}) as stream:
        for number, word in enumerate(WORDS):
            if stop.wait(2.4 if number % 211 == 180 else chance.expovariate(30)):
                break
            stream.write({"text": f"{word} "})
        stream.done()


def take(browser: Browser, command: InspectCommand, path: Path, *, width: int, height: int, scheme: str) -> None:
    dark = scheme == "dark"
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.goto(f"{command.page}&stream=answer-0a41c7f2")
    expect(page.locator("#gaps li")).to_have_count(2, timeout=60_000)
    page.wait_for_timeout(4_000)
    page.screenshot(path=path)
    assert path.stat().st_size < SIZE
    page.close()


def main(directory: Path) -> None:
    """Take them, of a new storage."""
    chance, stop = random.Random(SEED), threading.Event()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        url = f"sqlite:///{temporary}/streams.db"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        with StreamManager.connect(url, ttl=timedelta(hours=1)) as streams:
            fill(streams, chance)
            writer = threading.Thread(target=answer, args=(streams, chance, stop))
            writer.start()
            try:
                with InspectCommand(url, sys.stderr) as command:
                    take(browser, command, directory / "inspector.png", width=1280, height=860, scheme="light")
                    take(browser, command, directory / "inspector-phone.png", width=390, height=844, scheme="dark")
            finally:
                stop.set()
                writer.join()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
