"""The kernel that joins attention to parts of the keys compared with its reference in torch: on a GPU if there is one, else in Triton's
interpreter."""

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention import sdpa
from comfyui_qvg.qvg.attention.pieces import Running, join, partial
from kernel_cases import DEVICE, DTYPES, ON_GPU

pytest.importorskip("triton", reason="kernels are written in Triton")

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]

# batch, tokens, heads, head dim: less than a block of lines, a block and a line, and several with heads that do not divide it
SHAPES = [(1, 1, 1, 64), (2, 7, 3, 64), (1, 17, 1, 128), (2, 33, 3, 128), (1, 5, 4, 256)]
STEPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
INF, NAN = float("inf"), float("nan")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def part(batch, tokens, heads, dim, seed, dtype, heads_first=False):
    """Attention to some keys and its log-sum-exp: of three of more heads, or as torch's attention returns them."""
    if heads_first:
        return (drawn(batch, heads, tokens, dim, seed=seed, dtype=dtype).transpose(1, 2),
                3 * drawn(batch, heads, tokens, seed=seed + 100).transpose(1, 2))
    out, lse = drawn(batch, tokens, heads + 2, dim, seed=seed, dtype=dtype), 3 * drawn(batch, tokens, heads + 2, seed=seed + 100)
    return out[:, :, 1:heads + 1], lse[:, :, 1:heads + 1]


def exact(*parts):
    """Parts joined in float64."""
    sums = torch.stack([lse.double() for _, lse in parts])
    weights = (sums - sums.logsumexp(0)).exp()[..., None]
    return (torch.stack([out.double() for out, _ in parts]) * weights).sum(0), sums.logsumexp(0)


def joined(first, second, dtype=torch.float32):
    out = torch.empty(first[0].shape, dtype=dtype, device=DEVICE)
    lse = torch.empty(first[1].shape, device=DEVICE)
    join(*first, *second, out, lse)
    return out, lse


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_join(shape, dtype, heads_first, backend):
    first, second = (part(*shape, seed=seed, dtype=dtype, heads_first=heads_first) for seed in (0, 1))
    third = part(*shape, seed=2, dtype=dtype, heads_first=heads_first)
    before = [x.clone() for x in (*first, *second)]
    wide = torch.full((*shape[:2], shape[2] + 2, shape[3]), 7.0, dtype=dtype, device=DEVICE)
    target = wide[:, :, 2:]
    with backends.force(backend):
        out, lse = joined(first, second)
        assert all(map(torch.equal, before, (*first, *second)))
        for found, wanted in zip((out, lse), exact(first, second)):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
        # the last of three to its place, then the same over the running result
        join(out, lse, *third, target, torch.empty_like(lse))
        total = torch.empty_like(lse)
        join(out, lse, *third, out, total)
    wanted, sums = exact(first, second, third)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(total.double(), sums, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(target.double(), wanted, rtol=STEPS[dtype], atol=3e-6)
    assert (wide[:, :, :2] == 7).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_part_without_keys_changes_nothing(backend):
    (out, lse), (empty, none) = part(1, 9, 2, 64, 0, torch.float32), part(1, 9, 2, 64, 1, torch.float32)
    lse, none = lse.clone(), torch.full_like(none, -INF)
    for nothing in (empty, torch.full_like(empty, NAN)):
        with backends.force(backend):
            after, before = joined((out, lse), (nothing, none)), joined((nothing, none), (out, lse))
            neither = joined((nothing, none), (nothing, none))
        for found in (after, before):
            torch.testing.assert_close(found[0], out, rtol=1e-6, atol=0)
            torch.testing.assert_close(found[1], lse, rtol=1e-6, atol=1e-6)
        assert (neither[0] == 0).all() and (neither[1] == -INF).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_not_finite_stays_in_its_head(backend):
    parts = [[x.clone() for x in part(1, 9, 2, 64, seed, torch.float32)] for seed in range(2)]
    parts[0][0][0, 1, 0, 5] = NAN
    parts[1][1][0, 2, 1] = NAN
    parts[0][1][0, 3, 0] = INF
    broken, sums = torch.zeros(1, 9, 2, 64, dtype=torch.bool, device=DEVICE), torch.zeros(1, 9, 2, dtype=torch.bool, device=DEVICE)
    broken[0, 1, 0, 5], broken[0, 2, 1], broken[0, 3, 0], sums[0, 2, 1] = True, True, True, True
    for pair in (parts, parts[::-1]):
        with backends.force(backend):
            out, lse = joined(*pair)
        assert torch.equal(out.isnan(), broken)
        # infinity may become no number
        assert torch.equal(lse[0, [0, 1, 2, *range(4, 9)]].isnan(), sums[0, [0, 1, 2, *range(4, 9)]]) and not lse[0, 3].isfinite()[0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_one_softmax(dtype, backend):
    q, k, v = (drawn(2, count, 3, 64, seed=count, dtype=dtype) for count in (21, 90, 91))
    q, v, cuts = 3 * q, v[:, :90], [(0, 40), (40, 41), (41, 80), (80, 90)]
    whole = sdpa(*(x.double() for x in (q, k, v)))
    pieces = [partial(q, k[:, start:stop], v[:, start:stop]) for start, stop in cuts]
    target = torch.full((2, 21, 5, 64), 7.0, dtype=dtype, device=DEVICE)
    for count in (1, 3):
        running, one = Running(), torch.empty_like(q)
        with backends.force(backend):
            for piece in pieces[:count]:
                running.add(*piece)
            running.finish(target[:, :, 1:4], *pieces[count]) if count == 3 else running.finish(one)
        if count == 1:
            assert torch.equal(one, pieces[0][0]) and torch.equal(running.result(dtype), one)
    assert (target[:, :, 1:4].double() - whole).abs().max() < {torch.float32: 1e-5}.get(dtype, 4 * STEPS[dtype])
    assert (target[:, :, ::4] == 7).all()
    torch.testing.assert_close(running.result(torch.float32).double(), exact(*pieces[:3])[0], rtol=1e-5, atol=1e-5)


def test_a_part_alone_is_written_as_it_is():
    out, lse = part(1, 9, 2, 64, 0, torch.float32)
    target = torch.empty(1, 9, 2, 64, dtype=torch.float16, device=DEVICE)
    Running().finish(target, out, lse)
    assert torch.equal(target, out.half())


def test_what_has_no_kernel_is_refused():
    (out, lse), (other, more) = part(1, 9, 2, 64, 0, torch.float32), part(1, 9, 2, 64, 1, torch.float32)
    space, sums = torch.empty(1, 9, 2, 64, device=DEVICE), torch.empty(1, 9, 2, device=DEVICE)
    turned = torch.empty(1, 2, 64, 9, device=DEVICE).permute(0, 3, 1, 2)
    odd = torch.empty(1, 9, 2, 65, device=DEVICE)[..., :64]
    with backends.force("triton"):
        for wrong, words in (((out[..., :32], lse, other[..., :32], more, space[..., :32], sums), "heads of 32 channels have no kernel"),
                             ((out[0], lse[0], other[0], more[0], space[0], sums[0]), "not of one shape"),
                             ((out, lse, other[:, :8], more[:, :8], space, sums), "not of one shape"),
                             ((out, lse, other, more, turned, sums), "contiguous in memory"),
                             ((out, lse, odd, more, space, sums), "no multiples of 16"),
                             ((out, lse, other, more.double(), space, sums), "torch.float64"),
                             ((out, lse, other.double(), more, space, sums), "torch.float64"),
                             ((out, sums, other, more, space, sums), "memory of its own")):
            with pytest.raises(backends.Unsupported, match=words):
                join(*wrong)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")
def test_no_shape_is_compiled_for():
    from comfyui_qvg.kernels.join import join_kernel

    def compiled():
        return sum(len(caches[0]) for caches in join_kernel.device_caches.values())

    found = set()
    for shape in [(1, 32, 2), (2, 33, 1), (3, 1, 5), (1, 31, 16)]:
        for heads_first in (False, True):
            with backends.force("triton"):
                joined(*(part(*shape, 64, seed, torch.bfloat16, heads_first) for seed in range(2)))
            found.add(compiled())
    assert len(found) == 1 and found.pop() > 0
