"""Which attention reads a cache, exact or fast: every reason, and that what is said is what runs."""

import logging
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention import CachedAttention, Rope, attend, choice, sdpa, widened
from comfyui_qvg.qvg.attention.choice import attention_of, choose
from comfyui_qvg.qvg.attention.fast import fast
from comfyui_qvg.qvg.attention.functions import eight_bits
from comfyui_qvg.qvg.backends import Backend
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.commands import info
from comfyui_qvg.qvg.settings import COARSE, PRESETS, QVGSettings

AUTO, EXACT, FAST = (replace(PRESETS["balanced"], attention=attention) for attention in ("auto", "exact", "fast"))
HEADS, DIM, GRID, CHUNK = 4, 32, (3, 4), 3
SIZE = GRID[0] * GRID[1]


@pytest.fixture
def gpu(monkeypatch):
    """A device with a kernel for attention in eight bits, of a compute capability on which fast is known to be faster."""
    backends.register(Backend("pretend", devices=("cuda",), ops={"attend": sdpa}))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "FASTER", {(9, 0): True})
    yield monkeypatch
    backends.remove("pretend")


def test_auto_is_fast_where_nothing_speaks_against_it(gpu):
    for name in ("balanced", "smallest", "tiny"):
        function, sentence = choose(PRESETS[name], "cuda")
        assert function is eight_bits and sentence.startswith("fast (it loses next to nothing with")
    assert choose(AUTO.both(bits=1.0), "cuda").function is eight_bits


@pytest.mark.parametrize(("settings", "reason"), [
    (PRESETS["off"], "nothing is held in 2.5 bits or fewer"),
    (PRESETS["balanced"].both(bits=4), "nothing is held in 2.5 bits or fewer"),
    (replace(AUTO, key=replace(AUTO.key, bits=4)), "nothing is held in 2.5 bits or fewer"),
    (PRESETS["quality"], "transform up to 1.25 bits, not with transform and 2.5 bits"),
    (replace(AUTO, value=replace(AUTO.value, bits=2)), "transform up to 1.25 bits, not with transform and 2 bits"),
    (PRESETS["paper"], "transform up to 1.25 bits, not with paper and 2 bits"),
    (QVGSettings().both(bits=1), "transform up to 1.25 bits, not with qvg and 1 bits")])
def test_auto_is_exact_for_what_might_lose_by_it(gpu, settings, reason):
    function, sentence = choose(settings, "cuda")
    assert function is sdpa and sentence.startswith("exact (") and reason in sentence


def test_auto_is_exact_without_a_kernel():
    assert choose(AUTO, "cpu") == (sdpa, f"exact ({backends.refusal('attend', 'cpu')})")
    assert "not cpu" in choose(AUTO, "cpu").sentence


@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_auto_is_exact_with_heads_that_no_kernel_attends_to(gpu, head_dim):
    reason = f"heads of {head_dim} channels have no kernel for attention in eight bits, only those of 64 and 128"
    assert choose(AUTO, "cuda", head_dim=head_dim) == (sdpa, f"exact ({reason})")
    assert {choose(AUTO, "cuda", head_dim=size).function for size in (64, 128)} == {eight_bits}
    # as everywhere without a kernel
    assert choose(FAST, "cuda", head_dim=head_dim) == (eight_bits, f"fast (as set; in plain torch, which is slow: {reason})")


@pytest.mark.parametrize(("capability", "reason"), [((9, 0), "is slower on GPUs of compute capability 9.0"),
                                                    ((8, 9), "has not been measured to be faster on GPUs of compute capability 8.9")])
def test_auto_is_exact_where_fast_is_slower_or_nobody_knows(gpu, capability, reason):
    gpu.setattr(choice, "FASTER", {(9, 0): False})
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose(AUTO, "cuda") == (sdpa, f"exact (attention in eight bits {reason})")


def test_the_heads_are_those_of_the_cache(monkeypatch):
    monkeypatch.setattr(choice, "_speed", lambda device: "")
    backends.register(Backend("pretend", devices=("cpu",), ops={"attend": fast}))
    try:
        made, other = cache(AUTO), cache(AUTO, head_dim=64)
        assert (attention_of(made), attention_of(other)) == (sdpa, eight_bits)
    finally:
        backends.remove("pretend")
    assert made.stats().attention.startswith("exact (heads of 32 channels have no kernel")


@pytest.mark.parametrize("kernel", [False, True])
def test_info_says_which_heads(kernel, capsys):
    if kernel:
        backends.register(Backend("pretend", devices=("cpu", "cuda"), ops={"attend": fast}))
    try:
        info.main(None)
    finally:
        if kernel:
            backends.remove("pretend")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("heads of other than 64 or 128 channels: exact (")]
    assert len(said) == (kernel or torch.cuda.is_available())


def test_auto_is_exact_where_it_was_not_measured(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert choose(AUTO, "cuda") == (sdpa, "exact (attention in eight bits has not been measured to be faster on GPUs of compute capability "
                                          "12.0)")
    gpu.setattr(torch.version, "hip", "7.0")
    assert choose(AUTO, "cuda").sentence.endswith("faster on AMD GPUs)")


def test_auto_is_exact_on_devices_of_other_backends(gpu):
    backends.remove("pretend")
    backends.register(Backend("pretend", devices=("mps",), ops={"attend": sdpa}))
    assert choose(AUTO, "mps").sentence == "exact (attention in eight bits has not been measured to be faster on mps)"


def test_as_set():
    assert choose(EXACT, "cpu", exact=widened) == (widened, "exact (as set)")
    function, sentence = choose(FAST, "cpu")
    # the reference runs everywhere, and is said to be slow
    assert function is eight_bits and sentence.startswith("fast (as set; in plain torch, which is slow: ") and "not cpu" in sentence


def test_as_set_with_a_kernel(gpu):
    assert choose(FAST, "cuda") == (eight_bits, "fast (as set)")
    assert choose(EXACT, "cuda").function is sdpa


def test_nothing_is_rounded_twice(gpu):
    """Where somebody else computes attention, auto is exact, exact is not affected, and fast says what to do."""
    assert choose(AUTO, "cuda", widened, own="SageAttention") == (widened, "exact (SageAttention computes attention)")
    assert choose(EXACT, "cuda", widened, own="SageAttention") == (widened, "exact (as set)")
    with pytest.raises(ValueError, match=r"but SageAttention computes attention here.*Set attention to auto or exact"):
        choose(FAST, "cuda", widened, own="SageAttention")


def cache(settings, head_dim=DIM):
    return KVCache(settings, layers=1, heads=HEADS, head_dim=head_dim, grid=GRID, rope=Rope, dtype=torch.float32, max_frames=30)


def drawn(seed, head_dim=DIM):
    return [torch.randn(1, CHUNK * SIZE, HEADS, head_dim, generator=torch.Generator().manual_seed(3 * seed + part)) for part in range(3)]


def passes(made, **options):
    return [attend(made, 0, *drawn(number, made.geometry.head_dim), frames=CHUNK, store=True, **options) for number in range(6)]


def test_a_cache_is_read_as_its_settings_say():
    """By the low-level call, too; and what ran is part of its figures."""
    exact, fast, auto = (cache(settings) for settings in (EXACT, FAST, AUTO))
    outs = [passes(made) for made in (exact, fast, auto)]
    assert all(torch.equal(a, b) for a, b in zip(outs[0], outs[2]))
    # only from the third chunk on is there anything of few bits
    assert not any(torch.equal(a, b) for a, b in zip(outs[0][3:], outs[1][3:]))
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(outs[0], outs[1]))
    assert all(torch.equal(a, b) for a, b in zip(outs[1], passes(cache(EXACT), attention=eight_bits)))
    assert [made.stats().attention.partition(" ")[0] for made in (exact, fast, auto)] == ["exact", "fast", "exact"]
    assert exact.stats().as_dict()["attention"] == "exact (as set)"
    fast.free()
    assert fast.stats().attention == ""


def test_a_kernel_that_did_not_attend_is_named():
    def attend(q, k, v, space):
        raise backends.Unsupported(f"heads of {q.shape[-1]} channels")

    backends.register(Backend("pretend", devices=("cpu",), ops={"attend": attend}))
    try:
        made = cache(FAST, 64)
        passes(made)
    finally:
        backends.remove("pretend")
    assert made.stats().attention.startswith("fast (as set); torch (heads of 64 channels; ")


def test_one_choice_for_all_caches_of_a_run_logged_once(caplog):
    pair = cache(FAST), cache(FAST)
    pair[1].said = pair[0].said
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert attention_of(*pair, exact=widened) is eight_bits
            CachedAttention(pair[1], start_frame=0, frames=CHUNK, store=False)
    assert pair[0].attention == pair[1].attention
    assert [line for line in caplog.messages if "attention over" in line] == [f"QVG: attention over the KV cache: {pair[0].attention}"]


@pytest.mark.parametrize("bits", [4, 16])
def test_fast_is_refused_for_settings_that_keep_many_bits(bits):
    settings = PRESETS["off"] if bits == 16 else PRESETS["balanced"].both(bits=bits)
    with pytest.raises(ValueError, match=f"held in at most 2.5, but these settings hold old frames in {bits}. Set attention to auto"):
        replace(settings, attention="fast")
    assert replace(PRESETS["quality"], attention="fast").key_value_bits == COARSE


@pytest.mark.parametrize("attention", ["", "Fast", None, 8, ["auto"]])
def test_other_words_are_refused(attention):
    with pytest.raises(ValueError, match="choose one of auto, exact, fast"):
        replace(AUTO, attention=attention)


def test_settings_come_back_and_old_ones_are_auto():
    for settings in (AUTO, EXACT, FAST):
        assert QVGSettings.from_json(settings.to_json()) == settings
    # what an earlier release wrote, and what it can read
    assert "attention" not in AUTO.to_json() and QVGSettings.from_json(AUTO.to_json()).attention == "auto"
    assert all(settings.attention == "auto" for settings in PRESETS.values())


def test_it_decides_nothing_that_is_stored():
    assert EXACT.kept == FAST.kept == AUTO.kept == replace(AUTO, offload=True, host_gib=3.0).kept
    caches = [cache(settings) for settings in (EXACT, FAST)]
    for made in caches:
        for number in range(6):
            made.layers[0].append(*drawn(number)[1:], CHUNK)
    first, second = (one.layers[0] for one in caches)
    for a, b in zip(first.entries, second.entries):
        for one, other in zip(a.spans, b.spans):
            assert all(torch.equal(x, y) for x, y in zip(one.tensors().values(), other.tensors().values()))
