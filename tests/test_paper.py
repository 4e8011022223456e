"""Paper mode, byte for byte against what the quant-videogen 0.1.0 wheel wrote on a GPU, and known traits of its grid.

tests/data/paper_mode.safetensors: one bf16 tensor [1, 2, 300, 128], and for six settings the wheel's own centroids,
ids, codes, E4M3 scale bytes, zero points and decoded values.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyui_qvg.qvg.codec import e4m3
from comfyui_qvg.qvg.codec import paper_codes as paper

SETTINGS = {  # name: bits, symmetric, stages, block
    "int2s_s1_b64": (2, True, 1, 64),
    "int2s_s2_b16": (2, True, 2, 16),
    "int2s_s4_b64": (2, True, 4, 64),
    "int2a_s1_b64": (2, False, 1, 64),
    "int4s_s1_b64": (4, True, 1, 64),
    "int4a_s1_b64": (4, False, 1, 64),
}


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).parent / "data" / "paper_mode.safetensors")


def no_stages(x):
    """Centroids and ids of zero stages."""
    tokens, rows, channels = x.shape
    return torch.empty(0, rows, 1, channels, dtype=torch.bfloat16), torch.empty(0, tokens, rows, dtype=torch.uint8)


def token_major(tensor):
    """[1, H, T, D] as recorded -> [T, R, D]."""
    return tensor[0].transpose(0, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_released_package(recorded, name):
    bits, symmetric, stages, block = SETTINGS[name]
    centroids = torch.stack([recorded[f"{name}.centroids.{stage}"][0] for stage in range(stages)])
    ids = torch.stack([recorded[f"{name}.ids.{stage}"][0].T for stage in range(stages)])

    parts = paper.encode(token_major(recorded["x"]), centroids, ids, bits=bits, block=block, symmetric=symmetric)
    decoded = paper.decode(parts, centroids, ids, bits=bits)

    assert torch.equal(parts.codes, token_major(recorded[f"{name}.codes"]))
    assert torch.equal(parts.scales, token_major(recorded[f"{name}.scales"]))
    assert torch.equal(decoded, token_major(recorded[f"{name}.decoded"]))
    assert (parts.zeros is None) == symmetric
    if not symmetric:
        assert torch.equal(parts.zeros, token_major(recorded[f"{name}.zeros"]))


def test_symmetric_int2_uses_three_codes():
    x = torch.randn(513, 2, 128, generator=torch.Generator().manual_seed(0))
    symmetric = paper.encode(x, *no_stages(x), bits=2, block=64)
    asymmetric = paper.encode(x, *no_stages(x), bits=2, block=64, symmetric=False)
    assert paper._unpack(symmetric.codes, 2).unique().tolist() == [0, 1, 2]
    assert paper._unpack(asymmetric.codes, 2).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits,block,symmetric,expected", [
    (2, 16, True, 0.342), (2, 64, True, 0.514), (2, 128, True, 0.587), (2, 64, False, 0.203)])
def test_error_on_a_gaussian(bits, block, symmetric, expected):
    x = torch.randn(4096, 1, 128, generator=torch.Generator().manual_seed(1))
    centroids, ids = no_stages(x)
    parts = paper.encode(x, centroids, ids, bits=bits, block=block, symmetric=symmetric)
    error = (paper.decode(parts, centroids, ids, bits=bits, dtype=torch.float32) - x).square().mean().item()
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens,rows,channels,block", [
    (1, 1, 64, 64), (63, 3, 128, 128), (111, 2, 256, 16), (5, 24, 64, 16)])
def test_shapes_bytes_and_bound(tokens, rows, channels, block, symmetric, bits, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, rows, channels, generator=generator).to(dtype)
    centroids = torch.randn(2, rows, 7, channels, generator=generator).bfloat16()
    ids = torch.randint(7, (2, tokens, rows), generator=generator, dtype=torch.uint8)

    parts = paper.encode(x, centroids, ids, bits=bits, block=block, symmetric=symmetric)
    decoded = paper.decode(parts, centroids, ids, bits=bits)

    assert decoded.shape == x.shape and decoded.dtype == torch.bfloat16
    assert parts.nbytes == tokens * rows * (channels * bits // 8 + channels // block * (1 if symmetric else 2))
    # E4M3 moves a scale or a zero point by up to 1/16, and with it the ends of the range
    step = e4m3.decode(parts.scales).repeat_interleave(block, -1)
    zero = 0 if symmetric else e4m3.decode(parts.zeros).abs().repeat_interleave(block, -1)
    bound = step * (0.5 + 2**bits / 16) + zero / 16 + 0.05
    assert ((decoded.float() - x.float()).abs() <= bound).all()


def test_values_beyond_e4m3_saturate_and_stay_finite():
    x = torch.tensor([1500.0, -900.0, 0.0, 448.0]).repeat(16).view(1, 1, 64)
    centroids, ids = no_stages(x)
    parts = paper.encode(x, centroids, ids, bits=2, block=64)
    assert paper.decode(parts, centroids, ids, bits=2)[0, 0, :4].tolist() == [448.0, -448.0, 0.0, 448.0]


def test_a_block_of_zeros_decodes_to_zeros():
    x = torch.zeros(3, 2, 64)
    centroids, ids = no_stages(x)
    for symmetric in (True, False):
        parts = paper.encode(x, centroids, ids, bits=4, block=64, symmetric=symmetric)
        assert (paper.decode(parts, centroids, ids, bits=4) == 0).all()


def test_wrong_settings_are_refused_with_a_sentence():
    x = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match="2 or 4 bits, not 3"):
        paper.encode(x, *no_stages(x), bits=3, block=64)
    with pytest.raises(ValueError, match="blocks of 128"):
        paper.encode(x, *no_stages(x), bits=2, block=128)
