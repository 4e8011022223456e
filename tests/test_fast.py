"""Attention in eight bits, as defined: its error, its pieces, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch

from comfyui_qvg.qvg.attention import CachedAttention, Rope
from comfyui_qvg.qvg.attention.fast import TILE, attend, fast
from comfyui_qvg.qvg.attention.functions import eight_bits
from comfyui_qvg.qvg.attention.pieces import Running, partial
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS


def drawn(tokens, seed, spread=1.0):
    return spread * torch.randn(2, tokens, 3, 64, generator=torch.Generator().manual_seed(seed))


def error(out, exact):
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, TILE - 1, TILE, 5 * TILE + 7])
def test_it_is_near_exact_attention(tokens):
    # peaky, as attention of video models is
    q, k, v = drawn(300, 0, 4.0), drawn(tokens, 1), drawn(tokens, 2)
    (out, lse), (exact, sums) = fast(q, k, v), partial(q, k, v)
    assert error(out, exact) < 0.05
    assert (lse - sums).abs().max() < 0.2
    assert out.shape == exact.shape and lse.shape == sums.shape and lse.dtype == torch.float32


def test_what_all_keys_share_costs_nothing():
    q, k, v = drawn(100, 0, 3.0), drawn(200, 1), drawn(200, 2)
    shared = 30 * torch.randn(1, 1, 3, 64, generator=torch.Generator().manual_seed(3))
    (out, lse), (far, sums) = fast(q, k, v), fast(q, k + shared, v)
    assert error(out, far) < 0.02
    expected = torch.einsum("bqhd,xyhd->bqh", q, shared) / 8
    torch.testing.assert_close(sums - lse, expected, rtol=0, atol=0.01)


def test_pieces_with_means_of_their_own_join_to_the_whole():
    q, k, v = drawn(100, 0, 3.0), drawn(6 * TILE, 1), drawn(6 * TILE, 2)
    k[:, :2 * TILE] += 5
    joined = Running()
    for start, stop in ((0, 2 * TILE), (2 * TILE, 6 * TILE)):
        joined.add(*fast(q, k[:, start:stop], v[:, start:stop]))
    assert error(joined.result(q.dtype), partial(q, k, v)[0]) < 0.05


def test_other_dtypes_come_back():
    q, k, v = (drawn(40, seed).bfloat16() for seed in range(3))
    out, _ = fast(q, k, v)
    assert out.dtype == torch.bfloat16
    assert error(out.float(), partial(*(x.float() for x in (q, k, v)))[0]) < 0.06


def test_conditions_share_a_history():
    """What each of them gets is what it would get alone."""
    q, k, v = torch.cat([drawn(40, seed, 3.0) for seed in range(3)]), drawn(90, 4), drawn(90, 5)
    together = attend(q, k, v)
    alone = [fast(part, k, v) for part in q.split(2)]
    for found, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=1e-6)


def test_a_pass_hands_all_conditions_over_at_once():
    seen = []

    def tokens(count, seed):
        return torch.randn(count, 2, 36, 8, 64, generator=torch.Generator().manual_seed(seed)).unbind()

    cache = KVCache(PRESETS["balanced"], layers=1, heads=8, head_dim=64, grid=(3, 4), rope=Rope, batch=2, dtype=torch.float32, device="cpu",
                    max_frames=18, chunk_frames=3)
    for seed in range(5):
        cache.layers[0].append(*tokens(2, seed), 3)
    q, k, v = (torch.cat(tokens(2, 10 + seed)) for seed in range(3))

    def attention(q, k, v):
        return eight_bits(q, k, v)

    def history(q, k, v, space):
        seen.append((len(q), len(k)))
        return attend(q, k, v)

    attention.converts, attention.partial, attention.history = True, eight_bits.partial, history

    def attended(at):
        one = CachedAttention(cache, start_frame=15, frames=3, store=False, attention=attention)
        return one(0, *(x[at] for x in (q, k, v)))

    together = attended(slice(None))
    assert seen and set(seen) == {(4, 2)}
    torch.testing.assert_close(together, torch.cat([attended(slice(0, 2)), attended(slice(2, 4))]), rtol=0, atol=1e-6)
