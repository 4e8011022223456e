"""A video in segments on disk: it grows, it can be gone on with, and what is broken is not."""

import av
import pytest
import torch

from comfyui_qvg.qvg.segments import SUFFIX, SegmentFile


def frames(segment, count=4):
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(segment))


def run(path, key="a", segments=3, stop=None):
    """Segments whose given latents count them; `stop` leaves after so many, in the middle of writing the next. Returns those made."""
    video = SegmentFile(path, key, 15)
    made = []
    for segment in range(video.done, segments):
        assert (segment == 0) == (video.given is None)
        assert video.given is None or float(video.given.mean()) == segment
        video.add(frames(segment)[video.shown:])
        made.append(segment)
        if stop is not None and segment == stop:
            video.writer.cut()
            return made
        video.save(segment + 1, torch.full((1, 16, 2, 4, 6), float(segment + 1)), 1)
    video.finish()
    return made


def decoded(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def test_a_stopped_run_goes_on_and_makes_the_same(tmp_path):
    assert run(tmp_path / "whole_1_.mp4") == [0, 1, 2]
    path = tmp_path / "stopped_1_.mp4"
    assert run(path, stop=1) == [0, 1]
    assert len(decoded(path)) == 7, "it plays at any moment"
    assert SegmentFile.find(tmp_path, "stopped_*_.mp4", "a") == path
    assert run(path) == [1, 2]
    whole, pieces = decoded(tmp_path / "whole_1_.mp4"), decoded(path)
    assert len(whole) == len(pieces) == 10 and all((a == b).all() for a, b in zip(whole, pieces))
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == SUFFIX] == []


@pytest.mark.parametrize("damage", ["other key", "cut short", "not ours", "gone"])
def test_what_cannot_be_gone_on_with_is_not(tmp_path, damage):
    path = tmp_path / "video_1_.mp4"
    run(path, stop=1)
    session = path.with_suffix(SUFFIX)
    if damage == "cut short":
        session.write_bytes(session.read_bytes()[:-8])
    elif damage == "not ours":
        session.write_bytes(b"{}" * 40)
    elif damage == "gone":
        session.unlink()
    key = "b" if damage == "other key" else "a"
    assert SegmentFile.find(tmp_path, "video_*_.mp4", key) is None
    assert run(path, key) == [0, 1, 2]
