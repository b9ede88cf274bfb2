"""When events were seen to arrive: each once, in order, and in bounded memory."""

from streamkeep.inspector.sightings import SAME_SECONDS, Run, Sightings


def test_events_have_the_time_at_which_they_were_seen_and_others_none() -> None:
    sightings = Sightings("life")
    sightings.see(3, 2, 100.0, 0.5)
    sightings.see(7, 1, 101.0, 0.5)

    assert sightings.times(2, 7) == [None, 100.0, 100.0, None, None, 101.0, None]


def test_what_two_followers_see_counts_once_at_the_earlier_time() -> None:
    sightings = Sightings("life")
    first = sightings.see(0, 3, 100.0, 0.1)
    again = sightings.see(1, 4, 101.0, 0.1)

    assert first == (Run(0, 3, 100.0, 0.1),)
    assert again == (Run(3, 2, 101.0, 0.1),)
    assert sightings.see(0, 5, 102.0, 0.1) == ()
    assert sightings.times(0, 5) == [100.0, 100.0, 100.0, 101.0, 101.0]


def test_a_clock_that_goes_back_gives_no_silence_that_is_negative() -> None:
    sightings = Sightings("life")
    sightings.see(0, 1, 100.0, 0.1)
    sightings.see(1, 1, 50.0, -50.0)

    assert sightings.times(0, 2) == [100.0, 100.0]
    assert all(run.latency >= 0 for run in sightings.since(0))


def test_what_arrives_within_a_moment_takes_no_room_of_its_own() -> None:
    sightings = Sightings("life")
    for number in range(1000):
        sightings.see(number, 1, 100.0 + number * SAME_SECONDS / 1000, number / 1000)

    assert [(run.first, run.count, run.at) for run in sightings.since(0)] == [(0, 1000, 100.0)]
    assert sightings.since(0)[0].latency == 0.999


def test_only_the_newest_sightings_are_kept() -> None:
    sightings = Sightings("life", max_runs=10)
    for number in range(100):
        sightings.see(number, 1, 100.0 + number, 0.0)

    assert [run.first for run in sightings.since(0)] == list(range(90, 100))
    assert [run.first for run in sightings.since(97)] == [97, 98, 99]
