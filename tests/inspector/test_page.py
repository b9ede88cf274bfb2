"""The inspector's page in a browser, driven as a person would."""

import json
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect
from tests.inspector.command import InspectCommand

from streamkeep import PublicError
from streamkeep.sync import StreamInput, StreamManager

HOSTILE = '<img src=x onerror="document.title=1">\u202e\u0000</script>'
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\u0000", "\\u0000")

pytestmark = pytest.mark.timeout(120)


def write(streams: StreamManager, id: str, *chunks: object, done: bool = True, **options: str) -> None:
    with streams.open(id, **options) as stream:  # type: ignore[arg-type]  # strings all
        for chunk in chunks:
            stream.write(chunk)
        if done:
            stream.done("the end")


def go_to(page: Page, command: InspectCommand, stream: str) -> None:
    """Open the page on a stream, as a link with the token does."""
    page.goto(f"{command.page}&stream={stream}")
    expect(page.locator("#title")).to_have_text(stream)


def rows(page: Page) -> Locator:
    return page.locator("#events > li")


def shown_offsets(page: Page) -> list[int]:
    return [int(text.replace(",", "")) for text in rows(page).locator(".offset").all_inner_texts()]


@contextmanager
def writing(streams: StreamManager, id: str, seconds: float = 0.02) -> Generator[StreamInput]:
    """Write numbers to a stream until the block ends."""
    with streams.open(id) as stream:
        stop = threading.Event()

        def count() -> None:
            number = 0
            while not stop.wait(seconds):
                stream.write({"text": f"{number} "})
                number += 1

        writer = threading.Thread(target=count)
        writer.start()
        try:
            yield stream
        finally:
            stop.set()
            writer.join(20)


@pytest.fixture(autouse=True)
def stored(streams: StreamManager) -> Iterator[None]:
    """Leave no stream to the next test."""
    yield
    for stream in streams.list(limit=1000):
        streams.delete(stream.id)


def test_the_token_is_taken_out_of_the_address_and_a_reload_still_has_it(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", "hello")
    page.goto(command.page)
    expect(page.get_by_role("link", name="answer")).to_be_visible()
    assert command.token not in page.evaluate("location.href")

    page.reload()

    expect(page.get_by_role("link", name="answer")).to_be_visible()


@pytest.mark.parametrize("how", [{"modifiers": ["Control"]}, {"button": "middle"}, {"modifiers": ["Shift"]}], ids=str)
def test_a_stream_may_be_opened_in_another_tab(
    page: Page, context: BrowserContext, command: InspectCommand, streams: StreamManager, how: Any
) -> None:
    write(streams, "answer", 1)
    page.goto(command.page)
    with context.expect_page() as opened:
        page.locator("#list a").click(**how)
    other = opened.value
    expect(rows(other)).to_have_count(2)
    assert command.token not in other.evaluate("location.href")
    expect(page.locator("#nothing")).to_be_visible()


def test_who_has_no_token_is_told_so_and_sees_nothing(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    write(streams, "answer", "hello")
    page.goto(f"{command.url}/#stream=answer")
    expect(page.locator("#list-state")).to_contain_text("You are not let in")
    expect(page.locator("#why")).to_contain_text("You may not do this")
    expect(page.locator("#list > li")).to_have_count(0)


def test_the_list_shows_what_comes_and_goes(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    page.goto(command.page)
    expect(page.locator("#list-state")).to_have_text("There are no streams.")

    write(streams, "answer", 1, 2, 3, done=False, owner="ann", key="chat-7")
    row = page.get_by_role("link", name="answer")
    expect(row).to_contain_text("ann · chat-7")
    expect(row).to_contain_text("open")
    expect(row).to_contain_text("3 ·")
    streams.cancel("answer")
    expect(row).to_contain_text("cancelled")
    streams.delete("answer")
    expect(row).to_have_count(0)


def test_the_list_is_filtered_and_a_reload_keeps_the_filter(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    for number in range(60):
        write(streams, f"s-{number:02d}", owner=["ann", "bob"][number % 2], key=f"chat-{number}", done=number != 31)
    page.goto(command.page)
    items = page.locator("#list > li")
    expect(items).to_have_count(50)

    page.get_by_role("button", name="Next").click()
    expect(items).to_have_count(10)
    expect(page.locator("#page-number")).to_have_text("Page 2")
    page.get_by_role("button", name="Previous").click()
    expect(items).to_have_count(50)
    page.get_by_label("Owner").fill("bob")
    expect(items).to_have_count(30)
    page.get_by_label("Key begins with").fill("chat-3")
    expect(items).to_have_count(6)
    page.get_by_label("Status").select_option("open")
    expect(items).to_have_count(1)
    page.reload()
    expect(items).to_have_count(1)
    expect(items).to_contain_text("s-31")
    page.get_by_label("Id begins with").fill("x")
    expect(page.locator("#list-state")).to_have_text("No stream is like this.")


def test_events_are_shown_as_they_come_with_the_writer_rates_and_latency(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    with writing(streams, "answer") as stream:
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("open")
        expect(page.locator("#why")).to_contain_text("Its writer is alive, in another process.")
        expect(page.locator("#rate-words")).to_contain_text(re.compile(r"most \d"))
        expect(page.locator("#latency-words")).to_contain_text(re.compile(r"median \d+ ms"))
        expect(page.locator("#facts")).to_contain_text("0 · 1 page like this")
        seen = int(rows(page).last.locator(".offset").inner_text().replace(",", ""))
        page.wait_for_function(
            "seen => Number(document.querySelector('#events li:last-child .offset').textContent) > seen + 20", arg=seen
        )
        expect(rows(page).last.locator(".wait")).to_contain_text("ms")
        stream.flush()
    with streams.open("answer", resume=True) as stream:
        stream.done("the end")
    expect(page.locator("#state")).to_have_text("done")
    expect(rows(page).last).to_contain_text("the end")
    offsets = shown_offsets(page)
    assert offsets == list(range(offsets[0], offsets[-1] + 1))
    assert offsets[-1] == streams.info("answer").tail - 1


def test_a_reload_keeps_what_was_seen_of_the_pace(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    with streams.open("answer") as stream:
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("open")
        stream.write(1)
        expect(rows(page)).to_have_count(1)
        page.wait_for_timeout(1200)  # a silence is what is looked for
        stream.write(2)
        expect(page.locator("#gaps > li")).to_have_count(1)
        stream.done()
        expect(page.locator("#state")).to_have_text("done")
    page.reload()
    expect(page.locator("#gaps > li", has_text="before 1")).to_have_count(1)
    expect(page.locator("#pace")).to_contain_text("All of it was seen")
    page.get_by_role("button", name="before 1").click()
    expect(page.locator("#events .found .offset")).to_have_text("1")


def test_what_a_page_has_not_seen_come_is_said_to_be_spread_evenly(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", *range(10))
    go_to(page, command, "answer")
    expect(page.locator("#pace")).to_contain_text("Nobody here saw it come: its events are spread evenly")
    expect(page.locator("#rate-words")).to_have_text("nobody here saw it come")


def test_a_replay_shows_events_at_the_pace_at_which_they_came(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    with streams.open("answer") as stream:
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("open")
        for number in range(4):
            stream.write({"text": f"{number} "})
            page.wait_for_timeout(700)  # the pace that is to be seen again
        stream.done("the end")
    expect(rows(page)).to_have_count(5)

    page.evaluate(
        """() => {
            window.shown = [];
            const list = document.getElementById("events");
            new MutationObserver(() => window.shown.push([list.children.length, performance.now()])).observe(list, { childList: true });
        }"""
    )
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    expect(rows(page)).to_have_count(5)

    first: dict[int, float] = {}
    shown: list[tuple[int, float]] = page.evaluate("window.shown")
    for count, at in shown[next(place for place, (count, _) in enumerate(shown) if count == 0) :]:
        first.setdefault(count, at)
    assert set(first) >= {1, 2, 3}  # it did not come all at once
    page.get_by_role("button", name="Text").click()
    expect(page.locator("#text")).to_have_text("0 1 2 3 ")
    page.get_by_role("slider").fill("0")
    expect(page.locator("#text")).not_to_contain_text("1 ")
    page.get_by_role("button", name="End replay").click()
    expect(page.locator("#text")).to_have_text("0 1 2 3 ")


def test_a_long_stream_is_a_window_that_is_moved(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    with streams.open("answer") as stream:
        for number in range(5000):
            stream.write_soon(number)
        stream.done("the end")
    go_to(page, command, "answer")
    expect(page.locator("#log-note")).to_have_text("4,801 to 5,000 of 5,001")

    page.get_by_label("Offset").fill("2500")
    page.get_by_label("Offset").press("Enter")
    expect(page.locator("#events .found .offset")).to_have_text("2,500")
    for first in ("2,200", "2,000", "1,800", "1,600"):
        page.locator("#events").evaluate("list => { list.scrollTop = 0; }")
        expect(rows(page).first.locator(".offset")).to_have_text(first)
    offsets = shown_offsets(page)
    assert offsets == list(range(offsets[0], offsets[-1] + 1))
    assert len(offsets) <= 800
    page.get_by_role("button", name="Follow").click()
    expect(rows(page).last).to_contain_text("the end")


def test_a_burst_of_events_leaves_the_page_a_window(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    with streams.open("answer") as stream:
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("open")
        for _ in range(10):
            for number in range(3000):
                stream.write_soon(number)
            stream.flush()
        stream.done("the end")
    expect(rows(page).last).to_contain_text("the end")
    expect(page.locator("#log-note")).to_contain_text("of 30,001")
    offsets = shown_offsets(page)
    assert offsets == list(range(offsets[0], 30_001))
    assert len(offsets) <= 400


def test_what_others_wrote_is_text_and_hides_nothing(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    with streams.open("answer", owner=HOSTILE[:-1], key=HOSTILE, metadata={HOSTILE: HOSTILE, "__proto__": "x"}) as stream:
        stream.write(HOSTILE)
        stream.write({"text": HOSTILE, "__proto__": {"toString": 1}})
        stream.error(PublicError("INTERNAL", HOSTILE))
    go_to(page, command, "answer")
    expect(page.locator("#facts")).to_contain_text(SHOWN)
    expect(page.locator("#list")).to_contain_text(SHOWN)
    for place in range(3):
        rows(page).nth(place).locator("summary").click()
        expect(rows(page).nth(place).locator("pre")).to_contain_text("onerror=")
    page.get_by_role("button", name="Text").click()
    expect(page.locator("#text")).to_have_text(SHOWN * 2)
    assert page.locator("img, iframe, script:not([src])").count() == 0
    assert page.evaluate("document.body.textContent.includes('\\u202e')") is False
    expect(page).to_have_title("answer · internal")


def test_a_stream_is_stopped_and_deleted_when_that_is_confirmed(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    with streams.open("answer") as stream:
        stream.write("hello")
        go_to(page, command, "answer")
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Keep it").click()
        assert streams.info("answer").status == "open"
        page.get_by_role("button", name="Stop").click()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Stop it").click()
        expect(page.locator("#toast")).to_have_text("Stopped")
        expect(page.locator("#state")).to_have_text("cancelled")
        assert stream.cancelled.wait(10)

    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Delete it").click()

    expect(page.locator("#toast")).to_have_text("Deleted")
    expect(page.locator("#nothing")).to_be_visible()
    assert len(streams.list()) == 0


def test_a_stream_that_somebody_deletes_is_said_to_be_gone(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    write(streams, "answer", "hello", done=False)
    go_to(page, command, "answer")
    expect(rows(page)).to_have_count(1)
    streams.delete("answer")
    expect(page.locator("#state")).to_have_text("gone")
    expect(rows(page)).to_have_count(1)


def test_a_stream_is_copied_as_json(
    page: Page, context: BrowserContext, command: InspectCommand, streams: StreamManager
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    chunks = [{"text": HOSTILE}, [1, None], 2.5]
    write(streams, "answer", *chunks, owner="ann")
    go_to(page, command, "answer")
    page.get_by_role("button", name="Copy JSON").click()
    expect(page.locator("#toast")).to_have_text("Copied 4 events")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["stream"]["owner"] == "ann"
    assert [event["chunk"] for event in copied["events"][:3]] == chunks
    assert copied["events"][3] == {"offset": 3, "type": "done", "output": "the end"}


def test_all_can_be_done_by_the_keyboard(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    for name in ("a", "b", "c"):
        write(streams, name, 1, 2)
    page.goto(command.page)
    expect(page.get_by_role("link", name="c", exact=False)).to_have_count(1)
    page.keyboard.press("/")
    expect(page.get_by_label("Id begins with")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("b")
    expect(rows(page)).to_have_count(3)
    page.locator("#events summary").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(rows(page).nth(1).locator("pre")).to_have_text("2")
    page.keyboard.press("Escape")
    expect(page.locator("#nothing")).to_be_visible()
    expect(page.locator("#list a").nth(1)).to_be_focused()


def test_a_server_that_is_away_is_waited_for(
    page: Page, streams: StreamManager, shared_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write(streams, "answer", 1, done=False)
    with (tmp_path_factory.mktemp("log") / "log").open("w") as log, InspectCommand(shared_url, log) as mortal:
        go_to(page, mortal, "answer")
        expect(page.locator("#state")).to_have_text("open")
        assert mortal.stop() == 0
    expect(page.locator("#why")).to_contain_text("The server does not answer")
    expect(page.locator("#list-state")).to_contain_text("The server does not answer")
    expect(rows(page)).to_have_count(1)


def test_numbers_are_shown_and_copied_with_all_their_digits(
    page: Page, context: BrowserContext, command: InspectCommand, streams: StreamManager
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    write(streams, "answer", {"id": 9007199254740993, "x": 1.0, "none": [], "é": "a\n"})
    go_to(page, command, "answer")
    rows(page).first.locator("summary").click()
    expected = '{\n  "id": 9007199254740993,\n  "x": 1.0,\n  "none": [],\n  "é": "a\\n"\n}'
    expect(rows(page).first.locator("pre")).to_contain_text("9007199254740993")
    assert rows(page).first.locator("pre").text_content() == expected
    page.get_by_role("button", name="Copy JSON").click()
    expect(page.locator("#toast")).to_have_text("Copied 2 events")
    assert json.loads(page.evaluate("navigator.clipboard.readText()"))["events"][0]["chunk"]["id"] == 9007199254740993


def test_a_long_event_is_shown_as_far_as_it_fits(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    deep: object = list(range(100_000))
    for _ in range(200):
        deep = [deep]
    write(streams, "answer", deep)
    go_to(page, command, "answer")
    rows(page).first.locator("summary").click()
    expect(rows(page).first.locator("pre")).to_contain_text("…")
    assert rows(page).first.locator("pre").evaluate("pre => pre.textContent.length") <= 200_010


def test_characters_that_nobody_sees_are_shown_escaped(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    hidden = ["\U000e0041", "\u3164", "\u115f", "\ufe01", "\U000e0101", "\u034f", "\u2062", "\u00ad"]
    write(streams, "answer", {"text": "❤\ufe0f|" + "|".join(hidden)})
    go_to(page, command, "answer")
    text = rows(page).first.locator(".preview").text_content() or ""
    assert not any(character in text for character in hidden)
    assert "❤\ufe0f|\\u{e0041}|\\u3164|\\u115f|\\ufe01|\\u{e0101}|\\u034f|\\u2062|\\u00ad" in text


def test_a_stream_that_is_opened_anew_under_its_id_is_one_click_away(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", "first", done=False)
    go_to(page, command, "answer")
    expect(rows(page)).to_have_count(1)
    streams.delete("answer")
    expect(page.locator("#state")).to_have_text("gone")
    write(streams, "answer", "second")
    row = page.get_by_role("link", name="answer")
    expect(row).to_contain_text("done")
    row.click()
    expect(page.locator("#state")).to_have_text("done")
    expect(rows(page).first).to_contain_text("second")


def test_the_focus_stays_where_what_had_it_goes(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    for name in ("a", "b", "c"):
        write(streams, name, 1)
    page.goto(command.page)
    page.locator("#list a").nth(1).focus()
    streams.delete("b")
    expect(page.locator("#list a")).to_have_count(2)
    expect(page.locator("#list a").nth(1)).to_be_focused()

    for number in range(60):
        write(streams, f"d-{number}")
    expect(page.get_by_role("button", name="Next")).to_be_enabled()
    page.get_by_role("button", name="Next").press("Enter")
    expect(page.locator("#page-number")).to_have_text("Page 2")
    expect(page.get_by_role("button", name="Previous")).to_be_focused()

    with streams.open("answer") as stream:
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("open")
        stream.write(0)
        rows(page).first.locator("summary").focus()
        for number in range(1000):
            stream.write_soon(number)
        stream.flush()
        expect(page.locator("#events .offset", has_text="1,000")).to_have_count(1)
        expect(page.locator("#events")).to_be_focused()


def test_what_changes_all_the_time_is_not_read_out(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    with writing(streams, "answer"):
        go_to(page, command, "answer")
        expect(page.locator("#why")).to_contain_text("alive")
        read_out = page.evaluate(
            """() => new Promise((resolve) => {
                const changed = [];
                const all = { childList: true, subtree: true, characterData: true };
                for (const region of document.querySelectorAll("[role=status], output:not([aria-live=off])"))
                    new MutationObserver(() => changed.push(region.id)).observe(region, all);
                let updates = 0;
                const count = new MutationObserver(() => ++updates > 5 && resolve(changed));
                count.observe(document.getElementById("log-note"), all);
            })"""
        )
        assert read_out == []


def test_events_that_could_not_be_read_are_asked_for_again(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    write(streams, "answer", 1, 2)
    page.route("**/answer/events?*", lambda route: route.fulfill(status=503, body="{}"), times=1)
    go_to(page, command, "answer")
    expect(page.locator("#toast")).to_contain_text("Events could not be read")
    expect(rows(page)).to_have_count(3)


def test_an_address_with_a_password_works(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    write(streams, "answer", 1)
    page.goto(command.page.replace("http://", "http://operator:password@"))
    expect(page.get_by_role("link", name="answer")).to_be_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_fits_every_screen(page: Page, command: InspectCommand, streams: StreamManager, width: int) -> None:
    long = "x" * 255
    write(streams, long, {"text": "y" * 4000}, owner="o" * 1000, key="k" * 190)
    page.set_viewport_size({"width": width, "height": 740})
    page.goto(command.page)
    expect(page.locator("#list > li")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#list a").click()
    expect(rows(page)).to_have_count(2)
    rows(page).first.locator("summary").click()
    expect(rows(page).first.locator("pre")).to_contain_text("yyyy")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main").evaluate("main => main.scrollWidth - main.clientWidth") <= 0
    if width < 960:
        page.get_by_role("link", name="All streams").click()
        expect(page.locator("#list a")).to_be_visible()


def test_there_is_no_replay_of_a_stream_of_which_nothing_is_known(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", 1, 2)
    write(streams, "secret", 1)
    page.route("**/secret*", lambda route: route.fulfill(status=403, body="{}"))
    page.route("**/secret/live*", lambda route: route.fulfill(status=403, body="{}"))
    go_to(page, command, "answer")
    expect(page.get_by_role("button", name="Replay")).to_be_enabled()
    page.get_by_role("link", name="secret").click()
    expect(page.locator("#state")).to_have_text("cannot be read")
    expect(page.get_by_role("button", name="Replay")).to_be_disabled()
    expect(page.locator("#seek")).to_be_disabled()
    page.get_by_role("link", name="answer").click()
    expect(page.get_by_role("button", name="Replay")).to_be_enabled()


def test_a_replay_of_what_cannot_be_read_stops_and_asks_no_more(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", *range(5))
    go_to(page, command, "answer")
    expect(rows(page)).to_have_count(6)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/events?" in request.url else None)
    page.route("**/answer/events?*", lambda route: route.fulfill(status=503, body="{}"))
    page.get_by_role("button", name="Replay").click()
    expect(page.locator("#toast")).to_contain_text("The replay cannot go on")
    expect(page.locator("#play")).to_have_text("Play")
    page.unroute("**/answer/events?*")
    page.locator("#play").click()
    expect(rows(page)).to_have_count(6)
    assert len(asked) <= 5


# Connections that are few, dead, slow or refused


def test_many_pages_of_one_browser_leave_each_other_connections(
    context: BrowserContext, command: InspectCommand, streams: StreamManager
) -> None:
    with streams.open("answer") as stream:
        stream.write(1)
        pages = [context.new_page() for _ in range(8)]
        for page in pages:
            go_to(page, command, "answer")
            expect(rows(page)).to_have_count(1)
            expect(page.locator("#list > li")).to_have_count(1)
        last = pages.pop()
        expect(last.locator("#why")).to_contain_text("Other pages here follow streams already")

        stream.write(2)
        expect(rows(last)).to_have_count(2)
        for page in pages:
            page.close()
        expect(last.locator("#why")).to_have_text("Its writer is alive, in another process.")
        stream.write(3)
        expect(rows(last)).to_have_count(3)


def test_a_page_whose_connection_has_gone_dead_follows_again(
    page: Page, streams: StreamManager, shared_url: str, tmp_path: Path
) -> None:
    page.clock.install()
    with (
        (tmp_path / "log").open("w") as log,
        InspectCommand(shared_url, log) as stalling,
        streams.open("answer") as stream,
    ):
        stream.write(1)
        go_to(page, stalling, "answer")
        expect(rows(page)).to_have_count(1)
        with stalling.stalled():
            page.clock.fast_forward(25_000)
            expect(page.locator("#why")).to_contain_text("The server does not answer; trying again")
            stream.write(2)
        expect(rows(page)).to_have_count(2)
        stream.write(3)
        expect(rows(page)).to_have_count(3)
        expect(page.locator("#why")).to_contain_text("process")


def test_a_list_that_is_never_answered_is_asked_for_again(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    page.add_init_script(
        "AbortSignal.timeout = () => { const c = new AbortController(); setTimeout(() => c.abort(), 500); return c.signal; }"
    )
    page.route("**/api/streams?*", lambda _route: None, times=1)
    page.goto(command.page)
    expect(page.locator("#list-state")).to_contain_text("The server does not answer")
    write(streams, "answer", 1)
    expect(page.locator("#list > li")).to_have_count(1)


@pytest.mark.parametrize("status", [401, 403, 421])
def test_a_page_that_was_refused_for_a_while_follows_again(
    page: Page, command: InspectCommand, streams: StreamManager, status: int
) -> None:
    is_refused = True
    page.route("**/answer/live*", lambda route: route.fulfill(status=status, body="{}") if is_refused else route.continue_())
    page.route(
        "**/api/streams/answer", lambda route: route.fulfill(status=status, body="{}") if is_refused else route.continue_()
    )
    with streams.open("answer") as stream:
        stream.write(1)
        go_to(page, command, "answer")
        expect(page.locator("#state")).to_have_text("cannot be read")
        is_refused = False
        expect(rows(page)).to_have_count(1)
        stream.write(2)
        expect(rows(page)).to_have_count(2)


def test_a_page_of_somebody_elses_in_the_answers_place_is_said_to_be_that(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", 1, done=False)
    for path in ("**/answer/live*", "**/api/streams?*"):
        page.route(path, lambda route: route.fulfill(status=200, content_type="text/html", body="<h1>Log in</h1>"), times=1)
    go_to(page, command, "answer")
    expect(page.locator("#list-state")).to_contain_text("log in again")
    expect(rows(page)).to_have_count(1)


def test_a_burst_that_comes_while_a_window_is_asked_for_leaves_no_hole_in_it(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    with streams.open("answer") as stream:
        stream.write(0)
        held: list[Route] = []
        page.route("**/answer/events?*", lambda route: held.append(route), times=1)  # noqa: PLW0108 - Playwright marks what it is given
        go_to(page, command, "answer")
        for upto in (100, 2000):
            for number in range(stream.tail, upto):
                stream.write_soon(number)
            stream.flush()
            expect(page.locator("#facts dd").first).to_have_text(f"{upto:,}")
        held.pop().continue_()
        expect(page.locator("#log-note")).to_contain_text("1,999 of 2,000")
        offsets = shown_offsets(page)
        assert offsets == list(range(offsets[0], 2000))


def test_a_page_that_is_told_too_late_leaves_what_is_old_and_has_less_told(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/live?" in request.url else None)
    with streams.open("answer") as stream:
        stream.write(1)
        old: list[dict[str, object]] = [
            {"kind": "events", "tail": 2, "count": 1, "bytes": 1, "rows": [], "runs": [], "now": now}
            for now in (1000, 990, 980)
        ]
        body = "".join(f"data: {json.dumps(message)}\n\n" for message in old)
        page.route("**/answer/live?*", lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1)
        go_to(page, command, "answer")
        expect(rows(page)).to_have_count(1)
        stream.write(2)
        expect(rows(page)).to_have_count(2)
    assert ["pause=100" in asked[0], "pause=400" in asked[1], len(asked)] == [True, True, 2]


def test_what_was_seen_is_kept_where_another_process_answers_that_has_not_seen_it(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    merged = page_timing(page, command, [[5, 1, 30.0, 0.1], [6, 2, 32.0, 0.1]], [[0, 2, 10.0, 0.1], [5, 1, 31.0, 0.1]])
    assert merged == [[0, 2, 10.0, 0.1], [5, 1, 30.0, 0.1], [6, 2, 32.0, 0.1]]


def page_timing(page: Page, command: InspectCommand, *seen: list[list[float]]) -> object:
    """Give what the page makes of what several have seen."""
    page.goto(command.page)
    return page.evaluate("async (seen) => (await import('./timing.js')).Timing.of(...seen).runs", list(seen))


def test_a_list_that_has_not_been_looked_through_does_not_say_that_there_is_nothing(
    page: Page, command: InspectCommand, streams: StreamManager
) -> None:
    write(streams, "answer", 1)
    page.goto(command.page)
    expect(page.locator("#list > li")).to_have_count(1)
    page.route("**/api/streams?*", lambda route: route.fulfill(json={"streams": [], "next": "z", "now": 1, "read_only": False}))
    page.get_by_label("Key begins with").fill("x")
    expect(page.locator("#list-state")).to_contain_text("Next looks on")


def test_an_address_that_names_no_stream_shows_the_list(page: Page, command: InspectCommand, streams: StreamManager) -> None:
    write(streams, "answer", 1)
    page.goto(f"{command.page}&stream=")
    expect(page.locator("#list > li")).to_have_count(1)
    expect(page.locator("#nothing")).to_be_visible()
