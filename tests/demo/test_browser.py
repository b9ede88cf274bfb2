"""The demo's page, driven as a person would: nothing is lost or comes twice, and it says what became of the answer."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from tests.demo.server import Demo

from streamkeep.demo import TEXT
from streamkeep.demo.flow import TOKENS

ALL = f"{len(TOKENS) + 1:,}"  # the tokens, and the end

pytestmark = pytest.mark.timeout(120)  # a browser takes its time beside others


def ask(page: Page, demo: Demo, *, until: int) -> None:
    """Ask, and return when some of the answer has come."""
    page.goto(demo.url)
    page.get_by_role("button", name="Ask", exact=True).click()
    wait_for_offset(page, until)


def wait_for_offset(page: Page, offset: int) -> None:
    page.wait_for_function("least => parseInt(document.title) >= least", arg=offset)


def offset_of(page: Page) -> int:
    return int(page.title().partition(" ")[0])


def text_of(page: Page) -> str:
    text = page.locator("#text").text_content()
    assert text is not None
    return text


def second_window(context: BrowserContext, page: Page) -> Page:
    with context.expect_page() as opening:
        page.get_by_role("link", name="Second window").click()
    return opening.value


def expect_headline(page: Page, words: str, *, seconds: float = 20) -> None:
    expect(page.locator("#headline")).to_have_text(words, timeout=seconds * 1000)


def expect_nothing_lost(page: Page) -> None:
    expect(page.locator("#missing")).to_have_text("0")
    expect(page.locator("#doubled")).to_have_text("0")


def expect_the_whole_answer(page: Page) -> None:
    expect_headline(page, "Complete.")
    assert text_of(page) == TEXT
    expect(page.locator("#received")).to_have_text(ALL)
    expect(page.locator("#verdict")).to_contain_text("as the server has them")
    expect_nothing_lost(page)


def test_a_reload_in_mid_answer_loses_and_repeats_nothing(page: Page, demo: Demo) -> None:
    ask(page, demo, until=100)
    assert offset_of(page) < len(TOKENS) - 1

    page.get_by_role("button", name="Reload").click()

    expect(page.locator("#log")).to_contain_text("The page was reloaded")
    expect(page.locator("#log")).to_contain_text(re.compile(r"got the (\d+ missed events|one missed event) at once"))
    expect_the_whole_answer(page)


def test_the_same_answer_is_shown_as_other_clients_read_it(page: Page, demo: Demo) -> None:
    ask(page, demo, until=50)
    wire = page.locator("#wire")

    for dialect, is_so in (
        ("AI SDK", '"type":"text-delta"'),
        ("AG-UI", '"type":"TEXT_MESSAGE_CONTENT"'),
        ("plain SSE", "event: chunk"),
        ("Genkit", 'data: {"message":'),
    ):
        page.get_by_role("combobox", name="The same answer in").select_option(dialect)
        expect(wire).to_contain_text(is_so)
    expect_the_whole_answer(page)
    expect(wire).to_contain_text('data: {"result":')
    for dialect, end in (("AI SDK", "[DONE]"), ("AG-UI", '"type":"RUN_FINISHED"')):
        page.get_by_role("combobox", name="The same answer in").select_option(dialect)
        expect(wire).to_contain_text(end)


def test_the_words_that_were_chosen_stay_over_a_reload_are_those_of_a_second_window_and_end_in_view(
    page: Page, context: BrowserContext, demo: Demo
) -> None:
    ask(page, demo, until=50)
    page.get_by_role("combobox", name="The same answer in").select_option("AG-UI")

    page.get_by_role("button", name="Reload").click()

    second = second_window(context, page)
    for window in (page, second):
        expect(window.locator("#dialect")).to_have_value("ag-ui")
        expect(window.locator("#wire")).to_contain_text("TEXT_MESSAGE_CONTENT")
    second.get_by_role("button", name="Stop").click()
    for window in (page, second):
        expect(window.locator("#wire")).to_contain_text("RUN_ERROR")
        out_of_view = "box => box.scrollHeight - box.clientHeight - box.scrollTop"
        assert window.locator("#wire").evaluate(out_of_view) <= 1


@pytest.mark.slow
def test_an_answer_that_is_complete_survives_a_reload_too(page: Page, demo: Demo) -> None:
    ask(page, demo, until=100)
    expect_the_whole_answer(page)

    page.reload()

    expect(page.locator("#log")).to_contain_text("the stream has ended")
    expect_the_whole_answer(page)


@pytest.mark.slow
def test_a_second_window_gets_everything_from_the_first_word(page: Page, context: BrowserContext, demo: Demo) -> None:
    ask(page, demo, until=100)

    second = second_window(context, page)

    expect(page.locator("#readers")).to_contain_text("Window 2")
    expect(second.locator("#readers")).to_contain_text("Window 1")
    expect_the_whole_answer(second)
    expect_the_whole_answer(page)
    expect(page.locator("#readers .other")).to_contain_text(f"offset {len(TOKENS):,} · complete")


def test_after_a_cut_exactly_what_was_missed_comes_at_once(page: Page, demo: Demo) -> None:
    ask(page, demo, until=50)

    page.get_by_role("button", name="Cut the connection").click()
    expect_headline(page, "You have cut the connection.")
    cut_at = offset_of(page)
    expect(page.locator("#detail")).to_contain_text(re.compile(r"goes on without you: \d+ events to catch up on"))
    assert offset_of(page) == cut_at
    page.get_by_role("button", name="Reconnect").click()

    expect(page.locator("#log")).to_contain_text(f"Connected after offset {cut_at}; got the")
    expect_the_whole_answer(page)
    missed = "".join(page.locator("#text .late").all_text_contents())
    assert missed
    assert TEXT.startswith("".join(TOKENS[: cut_at + 1]) + missed)


def test_stop_in_one_window_stops_all(page: Page, context: BrowserContext, mortal_demo: Demo) -> None:
    ask(page, mortal_demo, until=20)
    second = second_window(context, page)
    wait_for_offset(second, 20)

    second.get_by_role("button", name="Stop").click()

    for window in (page, second):
        expect_headline(window, "Stopped.")
        expect_nothing_lost(window)
    assert text_of(page) == text_of(second)
    assert TEXT.startswith(text_of(page))
    assert offset_of(page) < len(TOKENS)


@pytest.mark.slow
def test_a_slow_reader_holds_nobody_up(page: Page, demo: Demo) -> None:
    ask(page, demo, until=50)

    page.get_by_role("button", name="Add a slow reader").click()

    expect(page.locator("#slow-text")).to_contain_text("Alice was beginning")
    expect_the_whole_answer(page)
    expect(page.locator("#readers li.slow")).to_contain_text("live")
    page.get_by_role("button", name="Remove the slow reader").click()
    expect(page.locator("#readers li.slow")).to_have_count(0)


def test_a_killed_server_that_is_back_tells_what_became_of_the_answer(
    page: Page, context: BrowserContext, mortal_demo: Demo
) -> None:
    ask(page, mortal_demo, until=30)

    mortal_demo.kill()
    expect_headline(page, "The server is away; trying again.")
    mortal_demo.start()

    # Ten seconds of lease, five of grace, and what the browser takes to come back.
    expect_headline(page, "The server was killed in mid-answer.", seconds=25)
    expect(page.locator("#log")).to_contain_text("The server is back, as another process")
    expect(page.locator("#log")).to_contain_text("ABORTED")
    expect_nothing_lost(page)
    assert TEXT.startswith(text_of(page))
    second = second_window(context, page)
    expect_headline(second, "The server was killed in mid-answer.")
    assert text_of(second) == text_of(page)


def test_a_server_that_is_shut_down_says_so_first(page: Page, mortal_demo: Demo, tmp_path: Path) -> None:
    ask(page, mortal_demo, until=30)

    assert mortal_demo.stop() == 0
    assert (tmp_path / "demo.log").read_text().count("took longer than") == 1

    expect_headline(page, "The server was shut down in mid-answer.")
    expect_nothing_lost(page)


def test_a_stream_that_is_not_there_is_said_not_to_be_there(page: Page, demo: Demo) -> None:
    page.goto(f"{demo.url}/?stream=nobodys")
    expect_headline(page, "The server has no such stream.")


def test_the_page_fits_a_phone(page: Page, demo: Demo) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page, demo, until=100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
