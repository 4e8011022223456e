"""PRoPE against the original code, below 1e-5 in float32.

tests/data/worldplay_cameras.safetensors holds, under prope.*, random cameras and tensors [B, T, H, D] of frames of 1 x 2 tokens, what the
original made of them, what attention returned and what the original made of that: heads of 64, heads of 12 with a batch of two, and heads
of 16 without intrinsics.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyui_qvg.qvg.attention import prope as module
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.prope import Prope

TOLERANCE = 1e-5
GRID = (1, 2)
CASES = ("wide", "narrow", "gta")


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(Path(__file__).parent / "data" / "worldplay_cameras.safetensors")
    return {case: {name.rpartition(".")[2]: x for name, x in tensors.items() if name.startswith(f"prope.{case}.")} for case in CASES}


def made(case, **changes):
    case = case | changes
    return Prope(case["q"].shape[-1], GRID, case["cameras"], case.get("intrinsics"))


@pytest.mark.parametrize("name", CASES)
def test_every_transform_is_the_original_s(recorded, name):
    case = recorded[name]
    prope = made(case)
    for method, given, wanted in (("queries", "q", "queries"), ("keys", "k", "keys"), ("values", "v", "values"),
                                  ("outputs", "attended", "outputs")):
        got = getattr(prope, method)(case[given])
        assert got.dtype == torch.float32
        assert (got - case[wanted]).abs().max() < TOLERANCE * case[wanted].abs().max().clamp(min=1), method


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_original_s(recorded, name):
    case = recorded[name]
    prope = made(case)
    got = prope.outputs(sdpa(prope.queries(case["q"]), prope.keys(case["k"]), prope.values(case["v"])))
    assert (got - case["outputs"]).abs().max() < TOLERANCE * case["outputs"].abs().max()


def test_only_cameras_relative_to_each_other_matter(recorded):
    """Another world, the same attention."""
    case = recorded["wide"]
    prope, moved = made(case), made(case, cameras=case["cameras"].double() @ case["cameras"][2].double())
    results = [p.outputs(sdpa(p.queries(case["q"]), p.keys(case["k"]), p.values(case["v"]))) for p in (prope, moved)]
    assert (prope.keys(case["k"]) - moved.keys(case["k"])).abs().max() > 0.1
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("frames", [slice(1, 3), [3, 0, 3], [2], slice(None, None, 2), ()])
def test_any_frames_and_heads(recorded, frames):
    """A history is read for any set of frames, and for some heads."""
    case = recorded["wide"]
    prope, whole = made(case), made(case).keys(case["k"])
    index = list(range(4))[frames] if isinstance(frames, slice) else list(frames)
    tokens = torch.tensor([frame * 2 + token for frame in index for token in range(2)], dtype=torch.long)
    for heads in (slice(0, 1), slice(1, 2), slice(None)):
        got = prope.keys(case["k"][:, tokens][:, :, heads], frames)
        torch.testing.assert_close(got, whole[:, tokens][:, :, heads], atol=1e-6, rtol=1e-5)


def test_pieces_and_a_given_output(recorded, monkeypatch):
    """Frame by frame it is the same as at once, into a part of a buffer, of another dtype, and in place."""
    case = recorded["narrow"]
    whole = made(case).queries(case["q"])
    monkeypatch.setattr(module, "PIECE", 1)
    buffer = torch.zeros(2, 10, 2, 12, dtype=torch.float64)
    x = case["q"].clone()
    got = made(case).queries(x, out=buffer[:, 3:9])
    assert got.data_ptr() == buffer[:, 3:9].data_ptr()
    torch.testing.assert_close(got.float(), whole, atol=1e-6, rtol=1e-6)
    assert not buffer[:, :3].any() and not buffer[:, 9:].any()
    torch.testing.assert_close(made(case).queries(x, out=x), whole, atol=1e-6, rtol=1e-6)


def test_bf16_is_rounded_once(recorded):
    """Matrices and sums are float32, so a result is that of the bf16 inputs, rounded once."""
    case = recorded["wide"]
    x = case["k"].bfloat16()
    got = made(case).keys(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, made(case).keys(x.float()).bfloat16())


def test_what_is_given_is_checked(recorded):
    case = recorded["wide"]
    with pytest.raises(ValueError, match="head dim of 30 is no multiple of 4"):
        Prope(30, GRID, case["cameras"])
    with pytest.raises(ValueError, match="6 tokens were given for 4 frames of 1 x 2"):
        made(case).keys(case["k"][:, :6])
    with pytest.raises(ValueError, match=r"have the shape \[4, 3, 4\]; give \[frames, 4, 4\]"):
        made(case, cameras=case["cameras"][:, :3])
    with pytest.raises(ValueError, match="4 cameras were given with 3 intrinsics"):
        made(case, intrinsics=case["intrinsics"][:3])
    with pytest.raises(ValueError, match="focal length of 0"):
        made(case, intrinsics=torch.zeros(4, 3, 3))
    with pytest.raises(ValueError, match="not finite"):
        made(case, cameras=case["cameras"] * torch.nan)
