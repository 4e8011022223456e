"""The kernel of PRoPE compared with its reference in torch: on a GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention import NoRope, Rope
from comfyui_qvg.qvg.attention.prope import Prope, Turn, project
from comfyui_qvg.qvg.attention.rope import rotate
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video.camera_moves import walk
from kernel_cases import DEVICE, DTYPES, ON_GPU, tokens

pytest.importorskip("triton", reason="kernels are written in Triton")

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]

# batch, frames, tokens of a frame, heads, head dim
SHAPES = [(1, 1, 1, 1, 64), (2, 3, 7, 3, 64), (1, 2, 33, 2, 128), (1, 3, 5, 4, 256)]


def inputs(batch, frames, places, heads, dim, dtype, seed=0):
    """Tokens, matrices that differ from frame to frame, and angles."""
    draw = torch.Generator().manual_seed(seed)
    matrices = torch.randn(frames, 4, 4, generator=draw).to(DEVICE)
    angles = 9 * torch.randn(frames * places, 1, dim // 2, generator=draw).to(DEVICE)
    return tokens(batch, frames * places, heads, dim, seed=seed, dtype=dtype), matrices, angles.cos(), angles.sin()


def exact(x, matrices):
    """Every four channels times the matrix of their frame, in float64."""
    quads = x.double().unflatten(1, (len(matrices), -1)).unflatten(-1, (-1, 4))
    return torch.einsum("fij,bfthgj->bfthgi", matrices.double(), quads).flatten(-2).flatten(1, 2)


def close(found, wanted, x):
    """Within one step of x's dtype at the size of a group of four channels, which are summed in float32 and rounded once."""
    step = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[x.dtype]
    found_quads, quads, sources = (tensor.double().unflatten(-1, (-1, 4)) for tensor in (found, wanted, x))
    size = quads.norm(dim=-1, keepdim=True) + 4 * sources.norm(dim=-1, keepdim=True)
    assert found.dtype == x.dtype
    assert ((found_quads - quads).abs() <= step * size).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_project(shape, dtype, backend):
    x, matrices, _, _ = inputs(*shape, dtype)
    out, before = torch.empty_like(x), x.clone()
    with backends.force(backend):
        project(x, matrices, out)
        assert torch.equal(x, before)
        close(out, exact(x, matrices), x)
        project(x, matrices, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_project_and_rotate_keys_and_values(shape, dtype, backend):
    """As world models read their history: slices of a workspace, keys rotated in place, values left as they are, nothing else written."""
    batch, frames, places, heads, dim = shape
    k, matrices, cos, sin = inputs(*shape, dtype)
    v, lead = inputs(*shape, dtype, seed=1)[0], 3
    near, far = torch.full((2, 2, batch, lead + frames * places + 2, heads, dim), 7.0, device=DEVICE, dtype=dtype)
    inside = slice(lead, lead + frames * places)
    near[0, :, inside], near[1, :, inside] = k, v
    with backends.force(backend):
        rotated = rotate(k, cos, sin)
        project(near[0, :, inside], matrices, far[0, :, inside], Turn(cos, sin, near[0, :, inside]),
                (near[1, :, inside], far[1, :, inside]))
    for side, x in enumerate((k, v)):
        close(far[side, :, inside], exact(x, matrices), x)
    close(near[0, :, inside], rotated, k)
    assert torch.equal(near[1, :, inside], v)
    for edge in (slice(0, lead), slice(inside.stop, None)):
        assert (near[:, :, edge] == 7).all() and (far[:, :, edge] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_and_rotate_some_heads(dtype):
    """Queries that stay as they are, of some heads of a wider tensor, to results of other strides."""
    wide, matrices, cos, sin = inputs(2, 3, 9, 6, 64, dtype)
    x, before = wide[:, :, 1:4], wide.clone()
    found = []
    for backend in ("triton", "torch"):
        out, turned = torch.full_like(wide, 7.0), torch.empty(2, 27, 3, 64, device=DEVICE, dtype=dtype)
        with backends.force(backend):
            project(x, matrices, out[:, :, 2:5], Turn(cos, sin, turned))
        assert (out[:, :, :2] == 7).all() and (out[:, :, 5:] == 7).all() and torch.equal(wide, before)
        close(out[:, :, 2:5], exact(x, matrices), x)
        found.append(turned)
    close(*found, x)


def test_what_has_no_kernel_is_refused():
    x, matrices, cos, sin = inputs(1, 2, 3, 2, 64, torch.float32)
    with backends.force("triton"):
        for wrong, words in (((x[..., :32].contiguous(), matrices, x[..., :32].contiguous()), "heads of 32 channels have no kernel"),
                             ((x, matrices, x.half()), "differ in shape or dtype"), ((x, matrices.double(), x), "torch.float64"),
                             ((x, matrices, x, Turn(cos[1:], sin[1:], x)), "angles"),
                             ((x, matrices, x, None, (x.transpose(1, 2).contiguous().transpose(1, 2), x)), "differ in strides")):
            with pytest.raises(backends.Unsupported, match=words):
                project(*wrong)


def test_not_finite_stays_in_its_group():
    x, matrices, cos, sin = inputs(1, 2, 8, 2, 64, torch.float32)
    x[0, 3, 1, 9] = float("nan")
    out, turned = torch.empty_like(x), torch.empty_like(x)
    with backends.force("triton"):
        project(x, matrices, out, Turn(cos, sin, turned))
    broken = torch.zeros_like(x, dtype=torch.bool)
    broken[0, 3, 1, 8:12] = True
    assert torch.equal(out.isnan(), broken)
    assert turned.isnan().sum() == 2


def test_both_branches_of_a_world_model():
    """A pass over a quantized history with the kernels, and the same with the references."""
    grid, heads, dim, path, outs = (2, 3), 4, 64, walk("right-7"), []
    chunks = [tokens(1, 4 * 6, heads, dim, seed=seed) / 10 for seed in range(6)]
    for backend in ("triton", "torch"):
        with backends.force(backend):
            cache = KVCache(PRESETS["off"], rope=NoRope, layers=1, heads=heads, head_dim=dim, grid=grid, branches=2, device=DEVICE,
                            dtype=torch.float32, chunk_frames=4, max_frames=8)
            prope = Prope(dim, grid, path.cameras, path.intrinsics)
            cache.layers[0].append(*chunks[:2], 4)
            attend = WorldAttention(cache, View(Rope(dim, grid), prope, range(4), range(4, 8)))
            outs.append(attend(0, *chunks[2:5], text=[chunks[5][:, :5], chunks[4][:, :5]]))
        assert cache.calls
    for ours, reference in zip(*outs):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)
        assert reference.std() > 0.1


@pytest.mark.skipif(not ON_GPU, reason="there are streams on a GPU only")
@pytest.mark.parametrize("offload", [False, True])
def test_two_streams_change_nothing(offload):
    """A context that is encoded while it attends, what is read of it, and a chunk that is stored."""
    grid, heads, dim, path, found = (8, 12), 8, 128, walk("right-15"), []
    chunks = [tokens(1, 8 * 96, heads, dim, seed=seed, dtype=torch.bfloat16) / 10 for seed in range(6)]
    text = [x[:, :33] for x in chunks[:2]]
    for overlap in (False, True):
        cache = KVCache(replace(PRESETS["balanced"], offload=offload), rope=NoRope, layers=3, heads=heads, head_dim=dim, grid=grid,
                        branches=2, device=DEVICE, chunk_frames=8, max_frames=16)
        if not overlap:
            cache.workspace.side = None
        assert (cache.workspace.side is not None) == overlap
        prope, rope, outs = Prope(dim, grid, path.cameras, path.intrinsics), Rope(dim, grid), []
        for frames, new, store in (([], range(8), True), (range(8), range(8, 16), False), (range(8), range(8, 16), True),
                                   ([], range(8), False)):
            attend = WorldAttention(cache, View(rope, prope, frames, new), store=store)
            for layer in range(3):
                outs += attend(layer, *chunks[len(outs) % 4:][:3], text=text)
        found.append((outs, cache.stats()))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert found[0][1].stored_bytes == found[1][1].stored_bytes and found[0][1].backends == found[1][1].backends
    assert all(outs.isfinite().all() for outs in found[0][0])
