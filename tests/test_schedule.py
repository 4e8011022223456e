"""Prompts over time: the notation, its refusals, and which frame gets which prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui_qvg.qvg.video import PromptTrack, Schedule, first_frame, latent_frames


def test_notation():
    schedule = Schedule.parse("0s: a ball: red\n 6.5s : it falls\n  and breaks\n\n1:05: swept up")
    assert schedule.entries == ((0, "a ball: red"), (6.5, "it falls and breaks"), (65, "swept up"))
    assert Schedule.parse(str(schedule)) == schedule


def test_a_text_without_times_is_one_prompt():
    assert Schedule.parse("a ball\nand 3 dogs: one blue").entries == ((0, "a ball and 3 dogs: one blue"),)


@pytest.mark.parametrize(("text", "words"), [
    ("", "is empty"), ("2s: late", "begins at 2s"), ("0s: a\n5s: b\n5s: c", "order of time"), ("0s: a\n5s:", "at 5s is empty"),
    ("a\n0s: b", "order of time")])
def test_refusals(text, words):
    with pytest.raises(ValueError, match=words):
        Schedule.parse(text)


@pytest.mark.parametrize(("seconds", "frame"), [(0, 0), (1 / 16, 1), (2 / 16, 2), (5 / 16, 2), (1, 5), (6.5, 27)])
def test_first_frame(seconds, frame):
    """Latent frame n > 0 begins with video frame 4n - 3."""
    assert first_frame(seconds, 16) == frame


@given(st.floats(0, 1000), st.sampled_from([12, 15, 16, 24, 30]))
def test_length_covers_the_seconds_and_no_more(seconds, rate):
    frames = latent_frames(seconds, rate)
    assert (4 * frames - 3) / rate >= seconds - 1e-6
    assert frames == 1 or (4 * (frames - 1) - 3) / rate < seconds


def test_track():
    made = []
    track = PromptTrack(Schedule.parse("0s: a\n1s: b"), lambda text: made.append(text) or text.upper(), 16)
    assert [track.context(frame) for frame in (0, 3, 4, 5, 9)] == ["A", "A", "A", "B", "B"]
    assert made == ["a", "b"]
    assert [track.name(frame) for frame in (4, 5)] == ["a", "b"]


@pytest.mark.parametrize("seconds", [0.00001, 6.0000001, 100_000.5, 999_999, 1 / 3])
def test_a_session_keeps_every_digit_of_a_time(seconds):
    schedule = Schedule(((0.0, "a"), (seconds, "b")))
    assert Schedule.parse(str(schedule)) == schedule
