"""Attention in eight bits on Hopper: what it compiles to, run by a machine of numpy; on a GPU of compute capability 9 the kernel itself."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ptx_machine import GLOBAL, Machine, Program, Stuck, Tiles

from comfyui_qvg.qvg.attention import fast
from comfyui_qvg.qvg.attention.pieces import Running, partial
from kernel_cases import DEVICE, ON_HOPPER

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="this Triton has no Gluon for Hopper")

needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9, because the interpreter does not know Gluon")
# Triton interprets in this process
PTX = """
from comfyui_qvg.benchmarks import aot
from comfyui_qvg.kernels.hopper_attend import Cut
variant = aot.attend_on_hopper({dim}, Cut(**{cut}))
print(aot.compiled_for(variant, next(target for target in aot.TARGETS if target.arch == 90)).asm["ptx"])
"""


def drawn(conditions, batch, count, tokens, heads, dim, device="cpu"):
    """q, k and v; keys have a mean, and some tokens are far from it."""
    draw = torch.Generator().manual_seed(count + tokens)
    q = torch.randn(conditions * batch, count, heads, dim, generator=draw)
    k = torch.randn(batch, tokens, heads, dim, generator=draw) + 2 * torch.randn(heads, dim, generator=draw)
    k[:, ::7] *= 3
    v = torch.randn(batch, tokens, heads, dim, generator=draw)
    return [x.bfloat16().to(device) for x in (q, k, v)]


def packed(k, v):
    """The history as `kernels.attend_pack.Packed` holds it, packed here."""
    missing = -k.shape[1] % 128
    k, v = (x.transpose(1, 2).float() for x in (k, v))
    mean, value_scales = k.mean(2), v.abs().amax(2) / fast.E4M3
    tiles = torch.nn.functional.pad(k - mean[:, :, None], (0, 0, 0, missing)).unflatten(2, (-1, fast.TILE))
    scales = tiles.abs().amax((3, 4)).clamp(min=fast.TINY) / fast.INT8
    keys = (tiles / scales[..., None, None]).round().to(torch.int8).flatten(2, 3).contiguous()
    values = torch.nn.functional.pad(v / value_scales[:, :, None], (0, 0, 0, missing)).to(torch.float8_e4m3fn)
    return SimpleNamespace(keys=keys, key_scales=scales, key_mean=mean, values=values.mT.contiguous(), value_scales=value_scales,
                           tokens=k.shape[2])


def assert_attends(out, lse, q, k, v):
    """As close to exact attention as the definition is, and closer to the definition than that."""
    k, v = (x.repeat(len(q) // len(x), 1, 1, 1) for x in (k, v))
    exact, exact_lse = partial(*(x.float().cpu() for x in (q, k, v)))
    defined, defined_lse = (x.float().cpu() for x in fast.fast(q, k, v))
    out, lse = out.float().cpu(), lse.cpu()
    assert out.isfinite().all()
    assert (out - exact).norm() < 1.1 * (defined - exact).norm() + 0.003 * exact.norm()
    assert (out - defined).norm() < 0.04 * defined.norm()
    # a query between two integers may become either
    assert (lse - exact_lse).abs().max() < 1.2 * (defined_lse - exact_lse).abs().max() + 0.005
    assert (lse - defined_lse).square().mean().sqrt() < 0.004


class Memory:
    """Global memory of a `Machine`, NaN where nothing was written."""

    def __init__(self):
        self.bytes, self.end = np.full(1 << 24, 0xFF, np.uint8), 0

    def place(self, tensor):
        """The address of a copy of the tensor."""
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        at, self.end = self.end, self.end + -(-raw.size // 256) * 256
        self.bytes[at:at + raw.size] = raw
        return GLOBAL + at

    def read(self, address, tensor):
        """Fill the tensor with what is at the address."""
        raw = tensor.view(torch.uint8).numpy().reshape(-1)
        raw[:] = self.bytes[address - GLOBAL:address - GLOBAL + raw.size]


@pytest.fixture(scope="module")
def compiled():
    """PTX for a head dim and arguments of `Cut`."""
    found = {}

    def compile(dim, cut):
        key = dim, *cut.items()
        if key not in found:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            result = subprocess.run([sys.executable, "-c", PTX.format(dim=dim, cut=cut)], env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-3000:]
            found[key] = result.stdout
        return found[key]

    return compile


def on_machine(ptx, q, history, cut, whole=None, pieces=1):
    """Output and log-sum-exp of every program of a launch, whose parts are joined here."""
    from comfyui_qvg.kernels.hopper_attend import boxes

    keys, queries = cut.keys, cut.queries
    entries, count, heads, dim = q.shape
    batch, _, rows = history.keys.shape[:3]
    each = -(-count // queries)
    blocks = each * entries * heads
    whole = blocks if whole is None else whole
    out, lse = torch.full(q.shape, float("nan"), dtype=q.dtype), torch.full(q.shape[:3], float("nan"))
    parts = torch.full((max(1, blocks - whole), pieces, queries, dim), float("nan"))
    part_lse = torch.full(parts.shape[:3], float("nan"))
    memory = Memory()
    inputs = [memory.place(x) for x in (q, history.key_mean, history.key_scales, history.value_scales)]
    results = [(memory.place(x), x) for x in (out, lse, parts, part_lse)]
    numbers = [count, heads, batch, history.tokens, rows, whole, pieces, *q.stride()[:3], dim ** -0.5]
    key_box, value_box = boxes(keys, dim)
    descriptors = {
        0: Tiles(history.keys.numpy().view(np.uint8).reshape(-1), [history.keys.numel() // (16 * dim), 2, 4, 2, dim],
                 [16 * dim, 2 * dim, 4 * dim, dim, 1], key_box, dim),
        11: Tiles(history.values.view(torch.uint8).numpy().reshape(-1), [batch * heads * dim, rows], [rows, 1], value_box, keys)}
    program = Program(ptx)
    # a descriptor is followed by its sizes and strides, which the kernel does not read
    parameters = [0] * 16 + [*inputs, *(address for address, _ in results), *numbers]
    for index in range(whole + (blocks - whole) * pieces):
        Machine(program, parameters, descriptors, memory.bytes, index, seed=index).run()
    for address, tensor in results:
        memory.read(address, tensor)
    for block, (found, found_lse) in enumerate(zip(parts[:blocks - whole], part_lse), whole):
        running = Running()
        for part in zip(found, found_lse):
            running.add(*part)
        row, first = block // each, block % each * queries
        entry, head = row // heads, row % heads
        held = slice(first, min(first + queries, count))
        out[entry, held, head], lse[entry, held, head] = (x[:held.stop - first] for x in (running.result(q.dtype), running._lse))
    return out, lse


@pytest.mark.parametrize(("conditions", "batch", "count", "tokens", "heads", "dim", "cut", "whole", "pieces"), [
    (1, 1, 20, 1, 1, 128, {}, None, 1),
    (1, 1, 128, 128, 1, 128, {}, None, 1),
    (2, 1, 70, 650, 2, 128, {}, None, 1),
    (1, 2, 130, 300, 1, 128, {}, 1, 2),
    (1, 1, 100, 500, 1, 64, {}, None, 1),
    (1, 1, 100, 450, 1, 128, {"keys": 64, "stages": 6}, None, 1),
    (1, 1, 200, 650, 1, 128, {}, 0, 2),
])
def test_on_a_machine(conditions, batch, count, tokens, heads, dim, cut, whole, pieces, compiled):
    from comfyui_qvg.kernels.hopper_attend import Cut

    q, k, v = drawn(conditions, batch, count, tokens, heads, dim)
    out, lse = on_machine(compiled(dim, cut), q, packed(k, v), Cut(**cut), whole, pieces)
    assert_attends(out, lse, q, k, v)


def test_the_machine_finds_mistakes(compiled):
    """A wait that is left out gives wrong results, and a barrier that nobody reaches stops all warps."""
    from comfyui_qvg.kernels.hopper_attend import Cut

    q, k, v = drawn(1, 1, 64, 520, 1, 128)
    ptx, history = compiled(128, {}), packed(k, v)
    with pytest.raises(Stuck):
        on_machine(re.sub(r"@%p\d+ mbarrier\.arrive\.shared\S* _, \[%r\d+\];", "", ptx), q, history, Cut())
    early = re.sub(r"wait_group\.sync\.aligned \t?0;", "wait_group.sync.aligned 2;", ptx)
    assert early != ptx
    with pytest.raises(AssertionError):
        assert_attends(*on_machine(early, q, history, Cut()), q, k, v)


@pytest.mark.parametrize(("blocks", "tiles", "places"), [(444, 732, 132), (300, 2196, 132), (1, 1, 132), (3, 13, 132), (132, 9, 132),
                                                         (133, 732, 132), (5000, 40, 114)])
def test_plan(blocks, tiles, places):
    """Every block is whole or cut into parts that have a tile at least; cutting ends no later than not cutting."""
    from comfyui_qvg.kernels.hopper_attend import PARTS, START, plan

    whole, pieces = plan(blocks, tiles, places)
    assert 0 <= whole <= blocks and 1 <= pieces <= tiles and (blocks - whole) * pieces <= PARTS * places
    assert pieces > 1 or whole == blocks

    def time(whole, pieces):
        return whole / places * (tiles + START) + -(-(blocks - whole) * pieces // places) * (-(-tiles // pieces) + START)

    assert time(whole if pieces > 1 else blocks // places * places, pieces) <= time(blocks // places * places, 1)


@pytest.mark.parametrize(("count", "heads", "entries", "whole", "pieces"), [(130, 3, 2, 5, 3), (128, 1, 1, 0, 2), (1, 2, 2, 3, 7)])
def test_join(count, heads, entries, whole, pieces):
    """Parts joined as the definition joins them, and what was whole left as it was."""
    from comfyui_qvg.kernels.hopper_attend_join import join_kernel

    queries, dim = 128, 64
    each = -(-count // queries)
    blocks = each * heads * entries
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(blocks - whole, pieces, queries, dim, generator=draw).to(DEVICE)
    part_lse = (5 * torch.randn(parts.shape[:3], generator=draw)).to(DEVICE)
    out, lse = torch.full((entries, count, heads, dim), 7.0, device=DEVICE), torch.full((entries, count, heads), 7.0, device=DEVICE)
    join_kernel[(blocks - whole, queries // 16)](parts, part_lse, out, lse, count, heads, whole, pieces, D=dim, ROWS=16, BLOCK=queries)
    expected, expected_lse = torch.full_like(out, 7.0), torch.full_like(lse, 7.0)
    for block in range(whole, blocks):
        weight = part_lse[block - whole].softmax(0)
        first = block % each * queries
        place = block // each // heads, slice(first, first + queries), block // each % heads
        held = min(queries, count - first)
        expected[place] = (weight[..., None] * parts[block - whole]).sum(0)[:held]
        expected_lse[place] = part_lse[block - whole].logsumexp(0)[:held]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("conditions", "batch", "count", "tokens", "heads", "dim"), [
    (1, 1, 1, 1, 1, 128), (1, 1, 128, 128, 2, 128), (2, 1, 300, 1561, 3, 128), (1, 2, 4680, 4680, 12, 128), (2, 2, 700, 3000, 5, 64),
    (1, 1, 4680, 30_000, 12, 128)])
def test_on_hopper(conditions, batch, count, tokens, heads, dim, dtype):
    """Queries are a slice of other heads; a second launch gives the same bits."""
    from comfyui_qvg.kernels.hopper_attend import attend_packed

    q, k, v = (x.to(dtype) for x in drawn(conditions, batch, count, tokens, heads + 2, dim, DEVICE))
    q, k, v = q[:, :, 1:-1], k[:, :, 1:-1], v[:, :, 1:-1]
    history = packed(k, v)
    out, lse = attend_packed(q, history)
    again, again_lse = attend_packed(q, history)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    few = slice(0, 300)
    assert_attends(out[:, few], lse[:, few], q[:, few], k, v)


def test_falls_back(monkeypatch):
    """Where the kernel for Hopper fails, the one for any GPU attends; what failed is not tried again."""
    from comfyui_qvg.kernels import attend, hopper_attend

    attempts = []

    def fails(q, history):
        attempts.append(len(q))
        raise RuntimeError("this Triton has no Gluon")

    q, k, v = drawn(1, 1, 20, 70, 1, 64, DEVICE)
    history = attend.pack(k, v, True)
    tile = attend.Tiling.of(attend.platform(q.device), 9)
    expected = attend.attend_packed(q, history, tile)
    monkeypatch.setattr(attend, "_hopper_failures", type(attend._hopper_failures)())
    monkeypatch.setattr(attend, "major", lambda device: 9)
    monkeypatch.setattr(hopper_attend, "attend_packed", fails)
    for _ in range(2):
        assert all(map(torch.equal, attend.attend_packed(q, history), expected))
    assert attempts == [1]


@needs_hopper
@pytest.mark.gpu
def test_op_on_hopper(monkeypatch):
    """The op packs and attends with this kernel where it may."""
    from comfyui_qvg.kernels import attend

    q, k, v = drawn(1, 1, 300, 1561, 3, 128, DEVICE)
    ours = attend.attend(q, k, v)
    monkeypatch.setattr(attend, "_on_hopper", lambda q, packed: None)
    general = attend.attend(q, k, v)
    assert not torch.equal(ours[0], general[0])
    assert_attends(*ours, q, k, v)
    assert (ours[0] - general[0]).float().norm() < 0.05 * general[0].float().norm()


@needs_hopper
@pytest.mark.gpu
def test_not_finite_on_hopper():
    """A key that is not finite makes all of its head NaN, and no other one."""
    from comfyui_qvg.kernels.hopper_attend import attend_packed

    q, k, v = drawn(1, 1, 200, 700, 2, 128, DEVICE)
    history = packed(k, v)
    history.key_scales[0, 1, 3] = float("nan")
    out, lse = attend_packed(q, history)
    assert out[:, :, 1].isnan().all() and lse[:, :, 1].isnan().all() and out[:, :, 0].isfinite().all()
