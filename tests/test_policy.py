"""What is held after every chunk, and in how many bits: tables written by hand from what `settings.QVGSettings` and `ageing.enforce_limits`
promise.

The cache and its forecast share one rule, so that each agrees with the other even where both are wrong. Here both are held against what a
person reads in the documentation. A row names settings and chunks, and after every chunk what is there, oldest first:
`first frame + frames = bits of K / bits of V`. Numbers of bytes are worked out beside the tables.
"""

from dataclasses import replace

import pytest

from comfyui_qvg.qvg.cache.ageing import Limits, split
from comfyui_qvg.qvg.cache.forecast import PlannedLayer
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from policy_cases import BASE, FEW, GEOMETRY, NO_CENTROIDS, PAPER, cache_of, check, held, parse, tokens

# settings, chunks, and what is held after each of them
AGEING = {
    "balanced": ({}, [3, 3, 3, 3], [
        "0+3=4/4",
        "0+3=4/4 3+3=4/4",
        "0+3=4/4 3+3=2/2 6+3=4/4",
        "0+3=4/4 3+3=2/2 6+3=2/2 9+3=4/4"]),
    "nothing is kept wider": ({"sink_frames": 0, "recent_frames": 0}, [3, 3], ["0+3=2/2", "0+3=2/2 3+3=2/2"]),
    "sinks alone": ({"recent_frames": 0}, [3, 3, 3], ["0+3=4/4", "0+3=4/4 3+3=2/2", "0+3=4/4 3+3=2/2 6+3=2/2"]),
    # of frames 0 to 5 the newest three are a whole span; of 0 to 6 they reach into the one before, which stays wide as long as one of them
    # is in it
    "recent frames reach into a span": ({"sink_frames": 0}, [3, 3, 1, 2], [
        "0+3=4/4",
        "0+3=2/2 3+3=4/4",
        "0+3=2/2 3+3=4/4 6+1=4/4",
        "0+3=2/2 3+3=2/2 6+1=4/4 7+2=4/4"]),
    "four recent frames": ({"sink_frames": 0, "recent_frames": 4}, [3, 3, 3, 3], [
        "0+3=4/4",
        "0+3=4/4 3+3=4/4",
        "0+3=2/2 3+3=4/4 6+3=4/4",
        "0+3=2/2 3+3=2/2 6+3=4/4 9+3=4/4"]),
    "two recent frames": ({"sink_frames": 0, "recent_frames": 2}, [3, 1, 1], [
        "0+3=4/4",
        "0+3=4/4 3+1=4/4",
        "0+3=2/2 3+1=4/4 4+1=4/4"]),
    "frame by frame": ({"sink_frames": 1, "recent_frames": 2}, [1, 1, 1, 1, 1], [
        "0+1=4/4",
        "0+1=4/4 1+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4",
        "0+1=4/4 1+1=2/2 2+1=4/4 3+1=4/4",
        "0+1=4/4 1+1=2/2 2+1=2/2 3+1=4/4 4+1=4/4"]),
    "a start image": ({"sink_frames": 1}, [1, 3, 3, 3], [
        "0+1=4/4",
        "0+1=4/4 1+3=4/4",
        "0+1=4/4 1+3=2/2 4+3=4/4",
        "0+1=4/4 1+3=2/2 4+3=2/2 7+3=4/4"]),
    "a start image before three sink frames": ({}, [1, 3, 3], [
        "0+1=4/4",
        "0+1=4/4 1+2=4/4 3+1=4/4",
        "0+1=4/4 1+2=4/4 3+1=2/2 4+3=4/4"]),
    "a start video in one pass": ({"recent_frames": 1}, [7, 3], [
        "0+3=4/4 3+4=4/4",
        "0+3=4/4 3+4=2/2 7+3=4/4"]),
    "a sink inside a chunk": ({"sink_frames": 2, "sink_bits": 16}, [3, 3], [
        "0+2=16/16 2+1=4/4",
        "0+2=16/16 2+1=2/2 3+3=4/4"]),
    "a sink over two chunks": ({"sink_frames": 4, "sink_bits": 3, "recent_frames": 0}, [3, 3, 3], [
        "0+3=3/3",
        "0+3=3/3 3+1=3/3 4+2=2/2",
        "0+3=3/3 3+1=3/3 4+2=2/2 6+3=2/2"]),
    # sink_bits and recent_bits are the least that is held, and never narrow what was chosen
    "fewer bits for sinks and recent frames": (
        {"key": replace(FEW, bits=4), "value": replace(FEW, bits=3), "sink_bits": 1, "recent_bits": 2}, [3, 3, 3], [
            "0+3=4/3",
            "0+3=4/3 3+3=4/3",
            "0+3=4/3 3+3=4/3 6+3=4/3"]),
    "between K and V": ({"key": replace(FEW, bits=4), "value": replace(FEW, bits=1), "recent_bits": 3, "sink_frames": 0}, [3, 3], [
        "0+3=4/3",
        "0+3=4/1 3+3=4/3"]),
    "one plane": ({"key": replace(FEW, bits=1), "value": replace(FEW, bits=1), "recent_bits": 2}, [3, 3, 3], [
        "0+3=4/4",
        "0+3=4/4 3+3=2/2",
        "0+3=4/4 3+3=1/1 6+3=2/2"]),
    "recent frames in 16 bits": ({"recent_bits": 16, "sink_frames": 0}, [3, 3], ["0+3=16/16", "0+3=2/2 3+3=16/16"]),
    "recent frames in 8 bits": ({"recent_bits": 8, "sink_frames": 0}, [3, 3], ["0+3=8/8", "0+3=2/2 3+3=8/8"]),
    "sinks in 8 bits": ({"sink_bits": 8}, [3, 3, 3], ["0+3=8/8", "0+3=8/8 3+3=4/4", "0+3=8/8 3+3=2/2 6+3=4/4"]),
    "V in 8 bits": ({"value": TensorSettings(bits=8), "sink_frames": 0}, [3, 3], ["0+3=4/8", "0+3=2/8 3+3=4/8"]),
    "V in 8 bits, recent frames in 16": ({"value": TensorSettings(bits=8), "sink_frames": 0, "recent_bits": 16}, [3, 3], [
        "0+3=16/16",
        "0+3=2/8 3+3=16/16"]),
    "window of a chunk": ({"window_frames": 3, "sink_frames": 0}, [3, 3, 3], ["0+3=4/4", "3+3=4/4", "6+3=4/4"]),
    # frames 2 to 5 are the newest four: the span of 0 to 2 stays for its last frame
    "window of four": ({"window_frames": 4, "sink_frames": 0}, [3, 3, 3], ["0+3=4/4", "0+3=2/2 3+3=4/4", "3+3=2/2 6+3=4/4"]),
    "window of two chunks": ({"window_frames": 6, "sink_frames": 0}, [3, 3, 3, 3], [
        "0+3=4/4",
        "0+3=2/2 3+3=4/4",
        "3+3=2/2 6+3=4/4",
        "6+3=2/2 9+3=4/4"]),
    "window of two frames": ({"window_frames": 2, "sink_frames": 0, "recent_frames": 1}, [1, 1, 1, 1], [
        "0+1=4/4",
        "0+1=2/2 1+1=4/4",
        "1+1=2/2 2+1=4/4",
        "2+1=2/2 3+1=4/4"]),
    "window of one frame": ({"window_frames": 1, "sink_frames": 0, "recent_frames": 0}, [1, 1, 1], ["0+1=2/2", "1+1=2/2", "2+1=2/2"]),
    "window behind sinks": ({"window_frames": 3, "sink_frames": 1}, [3, 3, 3], [
        "0+1=4/4 1+2=4/4",
        "0+1=4/4 3+3=4/4",
        "0+1=4/4 6+3=4/4"]),
    "window as long as the video": ({"window_frames": 9, "sink_frames": 0}, [3, 3, 3], [
        "0+3=4/4",
        "0+3=2/2 3+3=4/4",
        "0+3=2/2 3+3=2/2 6+3=4/4"]),
    "a short last chunk": ({"sink_frames": 0, "window_frames": 4}, [3, 3, 1], [
        "0+3=4/4",
        "0+3=2/2 3+3=4/4",
        "3+3=4/4 6+1=4/4"]),
}


@pytest.mark.parametrize("name", AGEING)
def test_what_ages(name):
    changes, chunks, expected = AGEING[name]
    check(replace(BASE, **changes), chunks, expected)


OTHERS = {
    "off": (PRESETS["off"], [3, 3], ["0+3=16/16", "0+3=16/16 3+3=16/16"]),
    "off behind a window": (replace(PRESETS["off"], window_frames=3, sink_frames=1), [3, 3], [
        "0+1=16/16 1+2=16/16",
        "0+1=16/16 3+3=16/16"]),
    "paper": (PAPER, [3, 3], ["0+3=2/2", "0+3=2/2 3+3=2/2"]),
    "paper, recent frames as they are": (replace(PAPER, recent_frames=3, recent_bits=16), [3, 3], ["0+3=16/16", "0+3=2/2 3+3=16/16"]),
    "paper with a sink": (replace(PAPER, sink_frames=1, sink_bits=4), [3, 3], ["0+1=4/4 1+2=2/2", "0+1=4/4 1+2=2/2 3+3=2/2"]),
}


# A frame of 256 tokens makes 7 centroids of 36 tokens each, which is too few where 256 are asked for: what comes first waits in 8 bits,
# sinks until the last of them, others until the first of them settles. What is to be held plainly anyhow has nothing to wait for.
MANY = TensorSettings(stages=1, centroids=256)
WAITING = {
    "sinks": ({}, [1, 1, 1, 1, 1, 1, 1], [
        "0+1=8/8",
        "0+1=8/8 1+1=8/8",
        "0+1=4/4 1+1=4/4 2+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4 3+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4 3+1=4/4 4+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4 3+1=4/4 4+1=4/4 5+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4 3+1=2/2 4+1=4/4 5+1=4/4 6+1=4/4"]),
    "a start image before chunks": ({}, [1, 3, 3], [
        "0+1=8/8",
        "0+1=4/4 1+2=4/4 3+1=4/4",
        "0+1=4/4 1+2=4/4 3+1=2/2 4+3=4/4"]),
    "a sink of one chunk": ({}, [3, 3, 3], ["0+3=4/4", "0+3=4/4 3+3=4/4", "0+3=4/4 3+3=2/2 6+3=4/4"]),
    "no sinks": ({"sink_frames": 0}, [1, 1, 1, 1, 1], [
        "0+1=8/8",
        "0+1=8/8 1+1=8/8",
        "0+1=8/8 1+1=8/8 2+1=8/8",
        "0+1=2/2 1+1=4/4 2+1=4/4 3+1=4/4",
        "0+1=2/2 1+1=2/2 2+1=4/4 3+1=4/4 4+1=4/4"]),
    "no sinks, chunks of three": ({"sink_frames": 0}, [3, 3], ["0+3=8/8", "0+3=2/2 3+3=4/4"]),
    "sinks in 16 bits, which need no codebook": ({"sink_frames": 1, "sink_bits": 16, "recent_frames": 2}, [1, 1, 1, 1], [
        "0+1=16/16",
        "0+1=16/16 1+1=8/8",
        "0+1=16/16 1+1=8/8 2+1=8/8",
        "0+1=16/16 1+1=2/2 2+1=4/4 3+1=4/4"]),
    "recent frames in 16 bits": ({"sink_frames": 0, "recent_frames": 1, "recent_bits": 16}, [1, 1], ["0+1=16/16", "0+1=2/2 1+1=16/16"]),
    "no recent frames": ({"sink_frames": 0, "recent_frames": 0}, [1, 1], ["0+1=2/2", "0+1=2/2 1+1=2/2"]),
    "sinks without recent frames": ({"sink_frames": 2, "recent_frames": 0}, [1, 1, 1], [
        "0+1=8/8",
        "0+1=4/4 1+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=2/2"]),
    "V in 8 bits": ({"sink_frames": 2, "recent_frames": 0, "value": TensorSettings(bits=8)}, [1, 1, 1], [
        "0+1=8/8",
        "0+1=4/8 1+1=4/8",
        "0+1=4/8 1+1=4/8 2+1=2/8"]),
    "no centroids": ({"key": NO_CENTROIDS, "value": NO_CENTROIDS}, [1, 1], ["0+1=4/4", "0+1=4/4 1+1=4/4"]),
    "behind a window": ({"sink_frames": 0, "window_frames": 2}, [1, 1, 1, 1], [
        "0+1=8/8",
        "0+1=8/8 1+1=8/8",
        "1+1=8/8 2+1=8/8",
        "2+1=8/8 3+1=8/8"]),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_a_codebook(name):
    changes, chunks, expected = WAITING[name]
    check(replace(QVGSettings(key=MANY, value=MANY, iterations=1), **changes), chunks, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_what_ages_in_other_codecs(name):
    check(*OTHERS[name])


# Without centroids a frame of K and V in b planes each takes 2 (256 b + 256 scales + 1 exponent) bytes: 2,562 for 4 planes, 2,050 for 3,
# 1,538 for 2, and 1,026 for 1. A codebook holds channel scales alone, 32 bytes for both. The limits leave a hundred bytes to either side.
# In 8 bits a frame of V takes 2,048 + 2 * 256; in 16, here of float32, it takes 8,192.
BUDGETS = {
    # the widest, and of equals the oldest, loses a plane, until the new frame fits; what has none left leaves, the oldest first
    "all are old": ({"bits": 4}, {}, Limits(3 * 2562 + 300), [1] * 7, [
        "0+1=4/4",
        "0+1=4/4 1+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4",
        "0+1=2/2 1+1=2/2 2+1=3/3 3+1=4/4",
        "0+1=1/1 1+1=1/1 2+1=2/2 3+1=2/2 4+1=4/4",
        "0+1=1/1 1+1=1/1 2+1=1/1 3+1=1/1 4+1=1/1 5+1=4/4",
        "1+1=1/1 2+1=1/1 3+1=1/1 4+1=1/1 5+1=1/1 6+1=4/4"]),
    # two recent frames: they lose planes only after all old ones have one left, and none leaves before that
    "old before recent": ({"bits": 2}, {"recent_frames": 2}, Limits(2 * 1538 + 2 * 2562 + 232), [1] * 7, [
        "0+1=4/4",
        "0+1=4/4 1+1=4/4",
        "0+1=2/2 1+1=4/4 2+1=4/4",
        "0+1=2/2 1+1=2/2 2+1=4/4 3+1=4/4",
        "0+1=1/1 1+1=1/1 2+1=1/1 3+1=4/4 4+1=4/4",
        "0+1=1/1 1+1=1/1 2+1=1/1 3+1=1/1 4+1=2/2 5+1=4/4",
        "1+1=1/1 2+1=1/1 3+1=1/1 4+1=1/1 5+1=1/1 6+1=4/4"]),
    # the sink's 2,562 bytes are lost to the others, and a frame of one plane more does not fit
    "sinks stay as they are": ({"bits": 4}, {"sink_frames": 1, "sink_bits": 4}, Limits(3 * 2562 + 300), [1] * 7, [
        "0+1=4/4",
        "0+1=4/4 1+1=4/4",
        "0+1=4/4 1+1=4/4 2+1=4/4",
        "0+1=4/4 1+1=1/1 2+1=2/2 3+1=4/4",
        "0+1=4/4 2+1=1/1 3+1=1/1 4+1=4/4",
        "0+1=4/4 3+1=1/1 4+1=1/1 5+1=4/4",
        "0+1=4/4 4+1=1/1 5+1=1/1 6+1=4/4"]),
    # planes of K go alone where K has more
    "K is wider": ({"key_bits": 3, "value_bits": 1}, {}, Limits(3400), [1] * 3, [
        "0+1=3/1",
        "0+1=3/1 1+1=3/1",
        "1+1=1/1 2+1=3/1"]),
    # 8 bits are no planes: only K can lose some
    "V in 8 bits": ({"key_bits": 2, "value_bits": 8}, {}, Limits(2 * 3329 + 180), [1] * 3, [
        "0+1=2/8",
        "0+1=2/8 1+1=2/8",
        "1+1=1/8 2+1=2/8"]),
    # from 16 bits a recent frame falls to what was chosen, not to 15
    "recent frames in 16 bits": ({"bits": 2}, {"recent_frames": 2, "recent_bits": 16}, Limits(4 * 8192 + 1000), [1] * 3, [
        "0+1=16/16",
        "0+1=16/16 1+1=16/16",
        "0+1=1/1 1+1=2/2 2+1=16/16"]),
    "chunks of two": ({"bits": 4}, {}, Limits(2 * 5122 + 300), [2] * 3, [
        "0+2=4/4",
        "0+2=4/4 2+2=4/4",
        "0+2=1/1 2+2=2/2 4+2=4/4"]),
    # what cannot be held at all leaves like what lies behind a window
    "a cap of frames": ({"bits": 2}, {}, Limits(None, 2), [1] * 4, [
        "0+1=2/2",
        "0+1=2/2 1+1=2/2",
        "1+1=2/2 2+1=2/2",
        "2+1=2/2 3+1=2/2"]),
    "the narrower of cap and window": ({"bits": 2}, {"window_frames": 1}, Limits(None, 2), [1] * 3, ["0+1=2/2", "1+1=2/2", "2+1=2/2"]),
    "the narrower of window and cap": ({"bits": 2}, {"window_frames": 2}, Limits(None, 1), [1] * 3, ["0+1=2/2", "1+1=2/2", "2+1=2/2"]),
}


def budget_settings(bits, changes):
    key, value = bits.get("key_bits", bits.get("bits")), bits.get("value_bits", bits.get("bits"))
    bare = QVGSettings(key=replace(NO_CENTROIDS, bits=key), value=replace(NO_CENTROIDS, bits=value), sink_frames=0, recent_frames=0)
    return replace(bare, **changes)


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_given_up_over_budget(name):
    bits, changes, share, chunks, expected = BUDGETS[name]
    check(budget_settings(bits, changes), chunks, expected, share)


def test_a_budget_is_used_to_the_byte():
    """Three frames of 2,562 bytes and a codebook of 32 just fit; where a byte is missing, the oldest loses a plane."""
    settings, fits = budget_settings({"bits": 4}, {}), 3 * 2562 + 32
    check(settings, [1, 1, 1], ["0+1=4/4", "0+1=4/4 1+1=4/4", "0+1=4/4 1+1=4/4 2+1=4/4"], Limits(fits))
    check(settings, [1, 1, 1], ["0+1=4/4", "0+1=4/4 1+1=4/4", "0+1=3/3 1+1=4/4 2+1=4/4"], Limits(fits - 1))
    # the codebook comes with the first span, before which there is nothing to give up
    check(settings, [1, 1], ["0+1=4/4", "0+1=3/3 1+1=4/4"], Limits(2 * 2562 + 31))


@pytest.mark.parametrize(("first", "frames", "sink", "newest", "parts"), [
    (0, 3, 0, 0, [(0, 3)]), (0, 3, 3, 0, [(0, 3)]), (0, 3, 4, 0, [(0, 3)]), (0, 3, 2, 0, [(0, 2), (2, 1)]), (3, 3, 4, 0, [(3, 1), (4, 2)]),
    (3, 3, 3, 0, [(3, 3)]), (3, 3, 2, 0, [(3, 3)]), (0, 8, 0, 3, [(0, 5), (5, 3)]), (0, 3, 0, 3, [(0, 3)]), (0, 2, 0, 3, [(0, 2)]),
    (0, 8, 2, 3, [(0, 2), (2, 3), (5, 3)]), (4, 8, 0, 1, [(4, 7), (11, 1)])])
def test_where_a_chunk_is_cut(first, frames, sink, newest, parts):
    assert split(first, frames, sink, newest) == parts


def test_a_history_that_arrives_whole_keeps_its_newest_frames_wider():
    settings = replace(BASE, sink_frames=0, recent_frames=3, recent_bits=3)
    real, planned = cache_of(settings).layers[0], PlannedLayer(settings, GEOMETRY, Limits(), itemsize=4)
    real.append(*tokens(8), 8, 3)
    planned.append(0, 8, 3)
    assert held(real.entries) == held(planned.spans) == parse("0+5=2/2 5+3=3/3")
