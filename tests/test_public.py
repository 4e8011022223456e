"""The public interface of the library: its names, what it refuses, and that nothing in it is differentiated."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from comfyui_qvg import qvg
from comfyui_qvg.qvg import CachedAttention, CacheStats, KVCache, NoRope, QVGSettings, Rope, attend, sdpa, widened


def cache_of(dtype=torch.float32, rope=Rope, preset="balanced"):
    return KVCache(QVGSettings.preset(preset).both(group=16), layers=2, heads=2, head_dim=32, grid=(4, 6), rope=rope, dtype=dtype)


def chunk(seed=0, dtype=torch.float32, frames=3):
    return torch.randn(3, 1, 24 * frames, 2, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_public_name_is_there():
    assert qvg.API_VERSION == 1 and set(qvg.__all__) <= set(dir(qvg))
    assert all(getattr(qvg, name) is not None for name in qvg.__all__)
    assert {"KVCache", "QVGSettings", "attend", "Sampler", "register_backend"} <= set(qvg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qvg.nothing  # noqa: B018


def test_settings_alone_load_no_sampler_and_no_codec_of_video_files():
    code = ("import sys; from comfyui_qvg.qvg import QVGSettings; QVGSettings.preset('balanced');"
            "print(sorted(name for name in sys.modules if name.startswith('comfyui_qvg.qvg.video') or name in ('av', 'triton', 'comfy')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_attend_is_a_pass_of_cached_attention():
    """Chunk by chunk, stored and not stored, the same as one object for the whole pass."""
    one, other = cache_of(), cache_of()
    for number in range(3):
        for store in (False, True):
            q, k, v = chunk(2 * number + store)
            whole = CachedAttention(other, start_frame=3 * number, frames=3, store=store)
            for layer in range(2):
                assert torch.equal(attend(one, layer, q, k, v, frames=3, store=store), whole(layer, q, k, v))
    assert one.frames == other.frames == 9 and one.stats() == other.stats()


@pytest.mark.parametrize(("dtypes", "sentence"), [
    ((torch.float32,) * 3, r"computes in torch\.float32, but this cache returns .* in torch\.bfloat16.*dtype=torch"),
    ((torch.bfloat16, torch.float32, torch.bfloat16), r"Queries are torch\.bfloat16, keys torch\.float32")])
def test_another_dtype_is_refused_at_the_first_call(dtypes, sentence):
    """Before it was attention that failed, at the second chunk."""
    cache = cache_of(torch.bfloat16)
    with pytest.raises(ValueError, match=sentence):
        attend(cache, 0, *(x.to(dtype) for x, dtype in zip(chunk(), dtypes)), frames=3, store=True)
    assert cache.frames == 0 and cache.stats().stored_bytes == 0


def test_attention_that_converts_may_be_wider_than_the_cache():
    cache = cache_of(torch.bfloat16)
    for number in range(2):
        for layer in range(2):
            out = attend(cache, layer, *chunk(number), frames=3, store=True, attention=widened)
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_another_device_is_refused():
    q, k, v = chunk().to("meta")
    with pytest.raises(ValueError, match=r"computes on meta, but this cache lies on cpu.*device='meta'"):
        attend(cache_of(), 0, q, k, v, frames=3)


def test_tokens_of_other_frames_are_refused():
    cache, (q, k, v) = cache_of(), chunk(frames=2)
    for store in (False, True):
        with pytest.raises(ValueError, match="48 tokens, keys 48 and values 48, but 3 latent frames of this cache have 72"):
            attend(cache, 0, q, k, v, frames=3, store=store)
    with pytest.raises(ValueError, match="keys 24 and values 48"):
        attend(cache, 0, q, k[:, :24], v, frames=2)
    assert cache.frames == 0


def test_a_freed_cache_holds_no_tables_of_backends():
    cache = cache_of()
    cache.memo["angles"] = torch.ones(1)
    cache.free()
    assert not cache.memo and cache.stats().stored_bytes == 0


@pytest.mark.parametrize("options", [5, [5], [["a", 1, 2]], [["a", [1]]], [[1, 1]], None])
def test_settings_with_false_options_are_refused_with_a_sentence(options):
    """They may come from a file."""
    fields = json.loads(QVGSettings.preset("balanced").to_json())
    fields["key"]["options"] = options
    with pytest.raises(ValueError, match=r"options is .*; give pairs of a name and"):
        QVGSettings.from_json(json.dumps(fields))


def test_stats_of_several_caches_add_up_kinds_that_only_one_has():
    stats = cache_of().stats()
    codes = replace(stats, by_kind={"codes": 3, "plain": 1})
    assert CacheStats.total([stats, codes]).by_kind == CacheStats.total([codes, stats]).by_kind == stats.by_kind | {"codes": 3, "plain": 1}


@pytest.mark.parametrize("preset", ["off", "balanced"])
def test_nothing_is_differentiated(preset):
    """A caller that forgot torch.no_grad keeps no graph alive in the cache."""
    cache = cache_of(preset=preset)
    for number in range(2):
        for layer in range(2):
            out = attend(cache, layer, *chunk(number).requires_grad_(), frames=3, store=True)
    assert not out.requires_grad and torch.is_grad_enabled()
    assert not any(tensor.requires_grad for layer in cache.layers for entry in layer.entries for span in entry.spans
                   for tensor in span.tensors().values())


def test_keys_that_carry_their_positions_are_left_alone():
    cache = cache_of(rope=NoRope, preset="off")
    kept = [chunk(number) for number in range(2)]
    for q, k, v in kept:
        for layer in range(2):
            out = attend(cache, layer, q, k, v, frames=3, store=True)
    q, _, _ = kept[1]
    exact = sdpa(q, *(torch.cat([pair[side] for pair in kept], dim=1) for side in (1, 2)))
    torch.testing.assert_close(out, exact)
