"""A video in segments on disk: it grows, it can be continued, and damaged files are refused."""

import json

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_qvg.qvg.files import InUse, Taken
from comfyui_qvg.qvg.files import places as files
from comfyui_qvg.qvg.video import segments
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.segment_file import SUFFIX, SegmentFile
from comfyui_qvg.qvg.video.segments import Segments, SegmentSession, digest
from comfyui_qvg.qvg.video.session import SessionError


def frames(segment, count=4):
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(segment))


def run(path, key="a", segments=3, stop=None):
    """Segments whose given latents count them; `stop` leaves after so many, in the middle of writing the next. Returns those made."""
    video = SegmentFile(path, key, 15)
    made = []
    for segment in range(video.done, segments):
        assert (segment == 0) == (video.given is None)
        assert video.given is None or float(video.given.mean()) == segment
        video.add(frames(segment)[min(segment, 1):])
        made.append(segment)
        if stop is not None and segment == stop:
            video.writer.flush()
            return made
        video.save(segment + 1, torch.full((1, 16, 2, 4, 6), float(segment + 1)))
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
    before = path.read_bytes()
    with pytest.raises(Taken, match=r"video_1_\.mp4 already exists"):
        SegmentFile(path, key, 15)
    assert path.read_bytes() == before
    assert run(tmp_path / "video_2_.mp4", key) == [0, 1, 2]


def test_an_unfinished_video_has_one_writer(tmp_path):
    """What an interrupted run leaves can be continued immediately, by one process."""
    path = tmp_path / "video_1_.mp4"
    video = SegmentFile(path, "a", 15)
    video.add(frames(0))
    video.save(1, torch.ones(1, 16, 2, 4, 6))
    with pytest.raises(InUse, match="being written by another run"):
        SegmentFile(path, "a", 15)
    video.release()
    again = SegmentFile(path, "a", 15)
    assert again.done == 1 and again.writer.digest == video.writer.digest
    again.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and len(decoded(path)) == 4
    # nothing was added, so nothing stays
    SegmentFile(tmp_path / "empty_1_.mp4", "a", 15).release()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def latents(seed, frames):
    return torch.randn(1, 16, frames, 6, 8, generator=torch.Generator().manual_seed(seed))


def two_segments(carry="pixels", start=""):
    made = Segments(carry, 9, start)
    made.add(latents(0, 5), 5, latents(1, 3))
    made.add(latents(2, 5 if carry == "pixels" else 2), 2, latents(3, 3))
    return made


def saved(tmp_path, **changes):
    path = tmp_path / "walk.safetensors"
    two_segments(**changes).save(path, "the model")
    return path


@pytest.mark.parametrize("carry", ["pixels", "latents"])
def test_a_session_holds_what_was_saved(tmp_path, carry):
    made, session = two_segments(carry), segments.load(saved(tmp_path, carry=carry))
    assert isinstance(session, SegmentSession) and session.fingerprint == "the model"
    again = session.resume("the model", Segments(carry, 9), 3, 8, 6)
    assert (again.carry, again.given_frames, again.new, again.done) == (carry, 9, [5, 2], 2)
    assert torch.equal(again.given, made.given) and all(map(torch.equal, again.parts, made.parts))
    assert torch.equal(again.latents, torch.cat([latents(0, 5), made.parts[1][:, :, -2:]], 2)) and again.latents.shape[2] == 7


def test_a_session_can_be_resumed_twice(tmp_path):
    """What one run adds does not reach another that continues the same session."""
    session = segments.load(saved(tmp_path))
    first = session.resume("the model", Segments("pixels", 9), 3, 8, 6)
    first.add(latents(4, 5), 2, latents(5, 3))
    assert (first.done, session.resume("the model", Segments("pixels", 9), 3, 8, 6).done) == (3, 2)


def test_start_frames_are_told_apart():
    images = torch.rand(3, 16, 24, 3)
    assert digest(images) == digest(images.clone()) != digest(images + 1e-3)
    assert digest(images) != digest(images[:2])


@pytest.mark.parametrize(("run", "sentence"), [
    ({"fingerprint": "another"}, "saved with another model"), ({"segments": 2}, "already has 2 segments"),
    ({"wanted": Segments("latents", 9)}, "carry pixels, but this run has latents"), ({"width": 6, "height": 8}, "latents of 8 x 6"),
    ({"wanted": Segments("pixels", 13)}, "given_frames 9, but this run has 13"),
    ({"wanted": Segments("pixels", 9, "b")}, "does not begin with the frames")])
def test_a_session_that_does_not_fit_is_refused(tmp_path, run, sentence):
    session = segments.load(saved(tmp_path, start="a"))
    fitting = {"fingerprint": "the model", "wanted": Segments("pixels", 9, "a"), "segments": 3, "width": 8, "height": 6}
    assert session.resume(**fitting).done == 2
    assert session.resume(**fitting | {"wanted": Segments("pixels", 9)}).done == 2, "start need not be connected again"
    with pytest.raises(SessionError, match=sentence):
        session.resume(**fitting | run)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(SessionError):
            segments.load(path)


@pytest.mark.parametrize("change", [
    {"new": [5, 9]}, {"new": []}, {"new": [5, 2, 2]}, {"given_frames": "x"}, {"start": "", "new": None}, {"kind": "other"}])
def test_a_header_that_contradicts_its_tensors_is_refused(tmp_path, change):
    """Checksums are right, what they cover is not."""
    path = saved(tmp_path)
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()[storage.HEADER]), {key: file.get_tensor(key) for key in file.keys()}
    storage.write(path, header | change, tensors)
    with pytest.raises(SessionError):
        segments.load(path)


def test_kinds_of_sessions_are_not_mixed_up(tmp_path):
    with pytest.raises(SessionError, match="a video of another kind"):
        storage.load(saved(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SessionError, match="no session of QuantVideoGen"):
        segments.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no session file"):
        segments.load(tmp_path / "nowhere.safetensors")


def test_a_save_that_fails_leaves_the_older_session(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    made = two_segments()
    made.add(latents(4, 5), 2, latents(5, 3))
    with pytest.raises(OSError, match="No space left"):
        made.save(path, "the model")
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]
