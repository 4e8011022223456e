"""Sessions of walks: saved and continued with every memory, and files that are not what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_world import GEOMETRY, PATH, RUN, SHAPE, VIEWS, image, make, network, video

from comfyui_qvg.qvg.attention import Rope
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, Sampler, session, walk_session
from comfyui_qvg.qvg.video.camera_moves import walk
from comfyui_qvg.qvg.video.session import SessionError
from comfyui_qvg.qvg.video.world import MEMORIES, WanScene, WorldCondition, WorldModel, walk_cache

__all__ = ["image", "network"]  # fixtures

SETTINGS = replace(PRESETS["balanced"], recent_frames=4)


def first_chunks(sampler, chunks):
    parts = []
    for event in sampler:
        if isinstance(event, ChunkDone):
            parts.append(event.latents)
            if len(parts) == chunks:
                return parts


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_walk_goes_on_another_day_bit_for_bit(network, image, memory, offload, tmp_path):
    settings, place = replace(SETTINGS, offload=offload), tmp_path / "walk.safetensors"
    whole, sampler = video(make(network, image, memory, settings)), make(network, image, memory, settings)
    begun = first_chunks(sampler, 4)
    walk_session.save(place, sampler, fingerprint="tiny", extra={"seconds": 3}, tensors={"more": torch.ones(2)})
    loaded = walk_session.load(place)
    assert (loaded.memory, loaded.frames_done, loaded.extra, loaded.run) == (memory, 16, {"seconds": 3}, RUN)
    assert torch.equal(loaded.cameras.cameras, PATH.cameras) and torch.equal(loaded.cameras.actions, PATH.actions)
    assert torch.equal(loaded.latents, torch.cat(begun, 2)) and torch.equal(loaded.tensors["more"], torch.ones(2))
    resumed = make(network, image, memory, settings)
    loaded.restore(resumed, "tiny")
    assert torch.equal(torch.cat([*begun, *first_chunks(resumed, 2)], 2), whole)
    # what a memory that rebuilds needs is small
    assert (place.stat().st_size < 100_000) == (memory == "rebuild")


def test_a_path_is_continued(network, image, tmp_path):
    sampler = make(network, image, "bank", SETTINGS)
    video(sampler)
    walk_session.save(tmp_path / "walk", sampler, fingerprint="tiny")
    loaded = walk_session.load(tmp_path / "walk")
    path = loaded.cameras.extended(walk("s-8"))
    scene = WanScene(network, sampler.model.conditions[0].scene.prompt, path.actions, image)
    cache = walk_cache(SETTINGS, GEOMETRY, memory="bank", views=VIEWS, frames=len(path), dtype=torch.float32)
    longer = Sampler(WorldModel([WorldCondition(scene, cache)], path, memory="bank", views=VIEWS, rope=Rope),
                     replace(RUN, frames=len(path)), SHAPE)
    loaded.restore(longer, "tiny")
    assert video(longer).shape[2] == 8
    assert longer.model.stats().held_frames == 32


def test_what_differs_is_refused_and_nothing_changed(network, image, tmp_path):
    sampler = make(network, image, "bank", SETTINGS)
    first_chunks(sampler, 2)
    walk_session.save(tmp_path / "walk", sampler, fingerprint="tiny")
    loaded = walk_session.load(tmp_path / "walk")
    other_way = make(network, image, "bank", SETTINGS)
    other_way.model.path = walk("left-23")
    for other, name, sentence in (
            (make(network, image, "bank", SETTINGS), "large", "another model"),
            (make(network, image, "append", SETTINGS), "tiny", "saved with the memory 'bank'"),
            (make(network, image, "bank", replace(SETTINGS, sink_frames=1)), "tiny", "other cache settings"),
            (other_way, "tiny", "does not begin with the 8 latent frames of walk")):
        with pytest.raises(SessionError, match=sentence):
            loaded.restore(other, name)
        assert not other.frames_done and not other.model.latents and not other.model.caches[0].frames
    with pytest.raises(SessionError, match="holds a video of another kind"):
        session.load(tmp_path / "walk")


@pytest.mark.parametrize(("field", "value", "sentence"), [
    ("memory", "all", "one of rebuild, append, bank"), ("memory", "rebuild", "an empty list"),
    ("frames_done", 12, "it must be 12, as header.frames_done"),
    ("views", {"recent": 3, "first": 0, "retrieved": 4}, "multiple of 4"), ("views", {"recent": 4}, "lacks its field first"),
    ("shape", [1, 48, 40, 60], r"is cut into|are cut into"), ("layers", [], "a list of 1 values")])
def test_false_fields_are_refused(network, image, tmp_path, field, value, sentence):
    sampler = make(network, image, "bank", SETTINGS)
    first_chunks(sampler, 2)
    place = tmp_path / "walk"
    walk_session.save(place, sampler, fingerprint="tiny")
    header, stored = session.read(place)
    header = {name: held for name, held in header.items() if name not in ("version", "tensors")}
    header["settings"] = [one.to_json() for one in header["settings"]]
    session.write(place, header | {field: value}, stored)
    with pytest.raises(SessionError, match=sentence):
        walk_session.load(place)


def test_false_cameras_are_refused(network, image, tmp_path):
    sampler = make(network, image, "rebuild", SETTINGS)
    first_chunks(sampler, 1)
    sampler.model.path.cameras[2] *= 1.5
    walk_session.save(tmp_path / "walk", sampler, fingerprint="tiny")
    sampler.model.path.cameras[2] /= 1.5
    with pytest.raises(SessionError, match="Camera 2 "):
        walk_session.load(tmp_path / "walk")
