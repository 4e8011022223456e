"""Numbers of bytes that were worked out by hand, for geometries small enough to do so: what tensors take, and what limits leave to them."""

from dataclasses import replace

import pytest
import torch

from byte_cases import BARE, EIGHT, EVEN, ODD
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache import ageing, codebooks, geometry, limits, sizes
from comfyui_qvg.qvg.cache.ageing import Limits
from comfyui_qvg.qvg.cache.forecast import PlannedLayer, forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec.pair import TensorCodec
from comfyui_qvg.qvg.registry import CODECS
from comfyui_qvg.qvg.settings import QVGSettings, TensorSettings
from comfyui_qvg.qvg.units import GIB

TWO = TensorSettings(stages=2, group=32)


@pytest.mark.parametrize(("kind", "changes", "bits", "parts"), [
    ("qvg", {}, 1, [3360, 840, 4, 840]),
    ("qvg", {}, 3, [3360, 3360, 3360, 840, 4, 840]),
    ("qvg", {"stages": 0}, 2, [3360, 3360, 840, 4, 0]),
    ("qvg", {"stages": 1, "group": 64}, 1, [3360, 420, 4, 420]),
    # a head narrower than a group is one group
    ("qvg", {"stages": 1, "group": 256}, 1, [3360, 420, 4, 420]),
    ("qvg", {}, 8, [26880, 1680]),
    ("qvg", {}, 16, [107520]),
    ("paper", {}, 2, [6720, 840, 840]),
    ("paper", {"symmetric": False}, 4, [13440, 840, 840, 840]),
    ("plain", {"stages": 0}, 8, [26880, 1680])])
def test_a_span(kind, changes, bits, parts):
    """And a real span takes as much."""
    tensor = replace(TWO, **changes)
    assert sizes.span_parts(ODD, kind, tensor, 3, bits, itemsize=4) == tuple(parts)
    assert sizes.span_bytes(ODD, kind, tensor, 3, bits, itemsize=4) == sum(parts)
    assert sum(sizes.span_parts(replace(ODD, batch=2), kind, tensor, 3, bits, itemsize=4)) == 2 * sum(parts)
    codec = TensorCodec(kind, tensor, 64, 1)
    x = torch.randn(105, 4, 64)
    span = codec.encode(x, bits, codec.train(x, torch.Generator()))
    counted = codec.bytes_by_kind(span)
    assert sum(counted.values()) == sum(parts) and span.bits == bits
    if kind == "qvg" and bits < 8:
        assert counted == {"planes": 3360 * bits, "scales": parts[-3] + 4, "ids": parts[-1]}
    elif kind == "paper":
        assert counted == {"planes": 3360 * bits, "scales": sum(parts[1:-1]) if len(parts) < 4 else parts[1] + parts[3], "ids": 840}
    else:
        assert counted == {"plain": sum(parts)}


def test_sixteen_bits_take_what_the_model_computes_in():
    assert [sizes.span_bytes(ODD, "plain", TWO, 3, 16, itemsize) for itemsize in (2, 4)] == [53760, 107520]


def test_offloaded_tensors_begin_at_whole_lines():
    assert list(map(geometry.aligned, (0, 1, 127, 128, 129, 840, 3360))) == [0, 128, 128, 128, 256, 896, 3456]
    settings = replace(BARE, key=TWO, value=TWO)
    # K in two planes 2 * 3360 + 840 + 4 + 840, V in one 3360 + 1684
    assert sizes.entry_bytes(ODD, settings, 3, (2, 1)) == 8404 + 5044
    assert sizes.entry_bytes(ODD, replace(settings, offload=True), 3, (2, 1)) == 2 * 3456 + 896 + 128 + 896 + 3456 + 896 + 128 + 896


@pytest.mark.parametrize(("kind", "changes", "frames", "count"), [
    # 210 tokens make 5 centroids of 36 tokens each: 2 stages * 4 rows * 5 * 64, their scales twice 2 * 4 * 64, channel scales twice 4 * 64
    ("qvg", {}, 6, 2560 + 1024 + 512),
    ("qvg", {"centroids": 3}, 6, 1536 + 1024 + 512),
    ("qvg", {"stages": 1}, 6, 1280 + 512 + 512),
    ("qvg", {"stages": 0}, 6, 512),
    ("qvg", {}, 1, 512 + 1024 + 512),
    # of the paper codec 105 tokens make 5 of 18 each, in two bytes a number
    ("paper", {}, 3, 5120)])
def test_a_codebook(kind, changes, frames, count):
    tensor = replace(TWO, **changes)
    assert sizes.codebook_bytes(ODD, kind, tensor, 35 * frames) == count
    book = TensorCodec(kind, tensor, 64, 1).train(torch.randn(35 * frames, 4, 64), torch.Generator())
    assert book.nbytes == count


@pytest.mark.parametrize(("tokens", "most", "count"), [(1, 256, 1), (35, 256, 1), (71, 256, 1), (72, 256, 2), (210, 256, 5), (210, 3, 3),
                                                       (100_000, 256, 256), (9216, 256, 256), (9215, 256, 255)])
def test_centroids_of_a_codebook(tokens, most, count):
    """36 tokens for each, half as many with the paper codec."""
    assert CODECS["qvg"].book_size(TensorSettings(centroids=most), tokens) == count
    assert CODECS["paper"].book_size(TensorSettings(centroids=most), tokens // 2) == count


def test_a_geometry():
    assert ODD.frame_tokens == 35 and ODD.rows == 4 and replace(ODD, batch=3).rows == 12
    # K and V, two bytes a number, two layers
    assert ODD.bf16_bytes(3) == 2 * 2 * 2 * 26880
    assert [replace(ODD, layers=layers).stages for layers in (1, 2, 30)] == [1, 2, 2]


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 1), (4, 1), (5, 1), (6, 3), (7, 1), (8, 2), (9, 3), (10, 2), (12, 3), (16, 4),
                                              (24, 6), (40, 10)])
def test_heads_that_are_decoded_at_once(heads, group):
    """The largest divisor of at most a quarter, or of at most three of six and more."""
    assert geometry.head_group(heads) == group


def test_buffers():
    assert [geometry.buffers_on(*what) for what in (("cpu", 12), ("cuda", 12), ("cuda", 2), ("cuda", 1), ("mps", 12))] == [1, 2, 2, 1, 1]


def test_a_workspace():
    # K and V of 210 tokens of one head of 64 channels in two bytes
    assert geometry.workspace_bytes(ODD, 6) == 2 * 210 * 64 * 2
    assert geometry.workspace_bytes(replace(ODD, batch=3, buffers=2), 6, itemsize=4) == 2 * 210 * 64 * 4 * 6
    assert geometry.workspace_bytes(replace(ODD, heads=12), 6) == 3 * 2 * 210 * 64 * 2
    cache = KVCache(BARE, layers=1, heads=12, head_dim=64, grid=(5, 7), rope=Rope, dtype=torch.bfloat16, max_frames=6)
    assert [tuple(part.shape) for part in cache.workspace.views(70)] == [(1, 70, 3, 64)] * 2
    assert cache.workspace.nbytes == 3 * 2 * 210 * 64 * 2


def test_a_workspace_without_an_end_grows_by_more_than_it_must():
    cache = KVCache(BARE, layers=1, heads=4, head_dim=64, grid=(5, 7), rope=Rope, dtype=torch.float32, batch=2)
    sizes = []
    for tokens in (70, 80, 87, 88):
        keys, values = cache.workspace.views(tokens)
        keys.fill_(1)
        values.fill_(2)
        assert (keys == 1).all() and keys.shape == (2, tokens, 1, 64)
        sizes.append(cache.workspace.nbytes)
    # a quarter more than 70 is 87; a quarter more than 88 is 110
    assert sizes == [2 * 2 * count * 64 * 4 for count in (87, 87, 87, 110)]


@pytest.mark.parametrize(("changes", "sink", "bits"), [
    ({}, False, (2, 2)), ({"recent_frames": 1}, False, (4, 4)), ({"sink_frames": 1}, True, (4, 4)), ({"recent_frames": 1}, True, (3, 3)),
    ({"sink_frames": 1}, False, (2, 2)), ({"recent_frames": 1, "recent_bits": 1}, False, (2, 2))])
def test_bits_of_a_new_span(changes, sink, bits):
    """Sinks and recent frames hold at least theirs, and no less than was chosen."""
    settings = replace(BARE, sink_bits=3 if "recent_frames" in changes else 4, **changes)
    assert ageing.first_bits(settings, sink) == bits


@pytest.mark.parametrize(("bits", "sink_bits", "sink", "needed"), [
    (2, 4, False, True), (2, 4, True, True), (2, 16, True, False), (2, 8, True, False), (2, 16, False, True), (8, 4, False, False),
    (16, 4, True, False)])
def test_what_needs_a_codebook(bits, sink_bits, sink, needed):
    settings = replace(BARE, sink_frames=1, sink_bits=sink_bits)
    assert ageing.needs_codebooks(replace(settings, key=TensorSettings(bits=bits)), sink)[0] is needed


@pytest.mark.parametrize(("sink", "window", "cap", "total", "seen", "stored"), [
    (3, 0, None, None, None, None),
    (3, 0, None, 20, 20, 18),
    (3, 0, None, 21, 21, 18),
    (3, 0, None, 19, 19, 18),
    (0, 0, None, 3, 3, 0),
    (0, 0, None, 1, 1, 0),
    # three sinks, six of the window, two frames of a chunk that overhangs it, and the chunk itself
    (3, 6, None, None, 14, 11),
    (0, 6, None, None, 11, 8),
    (3, 6, None, 10, 10, 9),
    (3, 6, None, 100, 14, 11),
    (3, 6, 5, None, 13, 10),
    (3, 4, 5, None, 12, 9),
    (3, 0, 5, 100, 13, 10)])
def test_frames_that_a_pass_sees(sink, window, cap, total, seen, stored):
    settings = replace(BARE, sink_frames=sink, window_frames=window)
    assert limits.capacity_frames(settings, 3, total, cap) == seen
    assert limits.history_frames(settings, 3, total, cap) == stored


def test_what_visits_the_device():
    """A frame of `EVEN` in b planes takes, aligned, 256 b + 256 scales + 128 + 256 ids a tensor: 3,328 for both of 4 planes, 2,304 of 2."""
    settings = replace(QVGSettings().both(stages=1, centroids=2), offload=True)
    staged = limits.staging_bytes(settings, EVEN, 3, 18, Limits())
    # three sinks, three recent frames and two more of a chunk that reaches into them
    assert staged == 3 * 3328 + 5 * 3328 + 10 * 2304
    assert limits.staging_bytes(settings, EVEN, 3, 18, Limits(40_000)) == 40_000
    assert limits.staging_bytes(settings, EVEN, 3, 18, Limits(staged + 1)) == staged
    assert limits.staging_bytes(settings, EVEN, 3, 2, Limits()) == 2 * 3328
    assert limits.staging_bytes(settings, EVEN, 3, 5, Limits()) == 5 * 3328
    assert limits.staging_bytes(replace(settings, sink_bits=2, sink_frames=2), EVEN, 1, 6, Limits()) == 2 * 2304 + 3 * 3328 + 2304
    assert limits.staging_bytes(replace(settings, offload=False), EVEN, 3, 18, Limits()) is None
    assert limits.staging_bytes(settings, EVEN, 3, None, Limits()) is None
    # where a frame is too little for a codebook, sinks wait as int8: 2048 numbers and 256 scales of two bytes, twice
    assert limits.staging_bytes(settings.both(centroids=256), EVEN, 3, 2, Limits()) == 2 * 5120


# A budget of `EVEN`, besides codebooks of 32 bytes each: the workspace takes 2 * 2,048 * 2 bytes a frame that a pass sees, the frames held
# and two chunks less one. The budgets lie in the middle between what two lengths need.
@pytest.mark.parametrize(("settings", "chunk", "total", "budget_bytes", "cap", "share"), [
    # 11 frames of workspace and 10 of 5,120 bytes are 141,312, one more of each 154,624
    (EIGHT, 1, None, 148_000, 10, 148_000 - 11 * 8192),
    (EIGHT, 1, 1000, 148_000, 10, 148_000 - 11 * 8192),
    # never more than the video has
    (EIGHT, 1, 8, 148_000, 8, 148_000 - 8 * 8192),
    # the newest of 4 planes, 2,562 bytes, the others of one, 1,026: for 5 frames 6 * 8,192 + 4 * 1,026 + 2,562 = 55,818
    (replace(BARE, recent_frames=1), 1, None, 60_000, 5, 60_000 - 6 * 8192),
    # chunks of three: 7,682 and 3,074 bytes; 6 frames see 11
    (replace(BARE, recent_frames=1), 3, None, 106_000, 6, 106_000 - 11 * 8192),
    # two sinks of 16 bits, 8,192 bytes each, are seen, too
    (replace(EIGHT, sink_frames=2, sink_bits=16), 1, None, 148_000 + 2 * 2 * 8192, 10, 148_000 + 2 * 8192 - 11 * 8192),
    # of which a video of one frame has one
    (replace(EIGHT, sink_frames=2, sink_bits=16), 1, 1, 24_000, 1, 24_000 - 8192),
])
def test_what_a_budget_leaves_to_a_layer(settings, chunk, total, budget_bytes, cap, share):
    found = limits.limits(replace(settings, budget_gib=budget_bytes / GIB), EVEN, chunk, total)
    assert (found.cap_frames, found.layer_bytes) == (cap, share)


def test_a_budget_is_shared_by_the_layers():
    one = limits.limits(replace(EIGHT, budget_gib=148_000 / GIB), EVEN, 1, None)
    # twice what is left beside one workspace
    two = limits.limits(replace(EIGHT, budget_gib=(148_000 + one.layer_bytes + 1) / GIB), replace(EVEN, layers=2), 1, None)
    assert two == one
    assert limits.limits(EIGHT, EVEN, 1, None) == Limits(None, None)


def test_a_limit_of_the_host():
    """10 frames of 5,120 bytes, of whole lines of 128; beside a budget, the smaller of both."""
    settings = replace(EIGHT, offload=True, host_gib=(51_200 + 300) / GIB)
    assert limits.limits(settings, EVEN, 1, None) == Limits(51_200 + 256, 10)
    assert limits.limits(replace(settings, budget_gib=1.0), EVEN, 1, None) == Limits(51_200 + 256, 10)
    assert limits.limits(settings, replace(EVEN, layers=2), 1, None).cap_frames == 5
    with pytest.raises(ValueError, match=r"A limit of .* GiB for offloaded spans is too small: .* need 4\.77e-06 GiB at the fewest bits"):
        limits.limits(replace(settings, host_gib=5000 / GIB), EVEN, 1, None)


def test_a_budget_of_what_is_offloaded():
    """On the device: the workspace, two layers that visit, and the newest span on its way. Of 4 frames in 8 bits, 5 * 8,192, 2 * 4 * 5,120
    and 5,120 bytes; what is offloaded of each of the layers may take half of what is left."""
    settings, layers = replace(EIGHT, offload=True), replace(EVEN, layers=5)
    found = limits.limits(replace(settings, budget_gib=(5 * 8192 + 9 * 5120 + 5000) / GIB), layers, 1, None)
    assert found.cap_frames == 4
    # without codebooks, which 8 bits never need
    assert found.layer_bytes // 128 == (4 * 5120 + 2500) // 128
    # with a sink of two frames in 16 bits, of which a chunk brings one: seen, held, and larger on its way than any other span
    more = 2 * 8192 + 2 * 2 * 8192 + 8192 - 5120
    sink = replace(settings, sink_frames=2, sink_bits=16, budget_gib=(5 * 8192 + 9 * 5120 + more + 5000) / GIB)
    found = limits.limits(sink, layers, 1, None)
    assert found.cap_frames == 4 and 0 <= 2 * 8192 + 4 * 5120 + 2500 - found.layer_bytes < 128 + 5 * 3 * 32 // 2
    host = limits.limits(replace(settings, budget_gib=(5 * 8192 + 9 * 5120 + 5000) / GIB, host_gib=5 * 3 * 5120 / GIB), layers, 1, None)
    assert host == Limits(3 * 5120, 3)


@pytest.mark.parametrize("settings", [EIGHT, replace(BARE, recent_frames=1), replace(EIGHT, sink_frames=2, sink_bits=16)])
def test_the_smallest_budget(settings):
    """A chunk, the one before it in the workspace, and the sink."""
    newest = 5120 if settings.key.bits == 8 else 2562
    least = 2 * 8192 + newest + settings.sink_frames * 2 * 8192
    assert limits.limits(replace(settings, budget_gib=(least + 200) / GIB), EVEN, 1, None).cap_frames == 1
    with pytest.raises(ValueError, match=r"A memory budget of .* is too small: .* Raise the budget"):
        limits.limits(replace(settings, budget_gib=(least - 100) / GIB), EVEN, 1, None)


def test_two_bytes_a_number_where_nothing_else_is_said():
    plain = replace(BARE.both(bits=16), sink_bits=16)
    assert sizes.span_bytes(EVEN, "plain", plain.key, 1, 16) == 4096 and sum(sizes.span_parts(EVEN, "plain", plain.key, 1, 16)) == 4096
    assert sizes.entry_bytes(EVEN, plain, 1, (16, 16)) == 8192 and geometry.workspace_bytes(EVEN, 1) == 8192
    assert limits.staging_bytes(replace(plain, offload=True), EVEN, 1, 3, Limits()) == 3 * 8192
    assert forecast(plain, EVEN, 3, 1).stored_bytes == 3 * 8192
    layer = PlannedLayer(plain, EVEN, Limits())
    layer.append(0, 3)
    assert layer.nbytes() == 3 * 8192
    # 4 frames are seen where 3 are held
    found = limits.limits(replace(plain, budget_gib=(7 * 8192 + 4000) / GIB), EVEN, 1, None)
    assert (found.cap_frames, found.layer_bytes) == (3, 3 * 8192 + 4000)


# 8 tokens of 128 channels a frame, so that codebooks weigh: 512 bytes for those of K and V, without centroids. A frame of both takes 290
# bytes in one plane and 546 in two, three in one span 866 and 1,634, and 4,096 of workspace.
THIN = Geometry(layers=1, heads=1, head_dim=128, grid=(1, 8))
SHORT = replace(BARE, codebook_frames=4)
LARGE = QVGSettings().both(stages=1, centroids=256)


def frames_within(settings, geometry, chunk, count):
    return limits.limits(replace(settings, budget_gib=count / GIB), geometry, chunk, None).cap_frames


@pytest.mark.parametrize(("settings", "geometry", "chunk", "count", "frames"), [
    # 8 frames and the one that sees them; 7 of one plane and the newest of two; a codebook for every four and one more
    (SHORT, THIN, 1, 9 * 4096 + 7 * 290 + 546 + 3 * 512, 8),
    (SHORT, THIN, 1, 10 * 4096 + 8 * 290 + 546 + 4 * 512, 9),
    # codebooks serve whole chunks: six frames
    (SHORT, THIN, 3, 11 * 4096 + 866 + 1634 + 2 * 512, 6),
    (SHORT, THIN, 3, 12 * 4096 + 2 * 866 + 1634 + 3 * 512, 7),
    # offloaded, planes take 128 bytes, scales and exponents as many: 768 and 1,024. A layer visits, a span is on its way, and a codebook
    # for every chunk and two more stay on the device
    (replace(SHORT, offload=True), THIN, 1, 5 * 4096 + 3 * 768 + 1024 + 1024 + 7 * 512, 4),
    (replace(SHORT, offload=True), THIN, 1, 6 * 4096 + 4 * 768 + 1024 + 1024 + 8 * 512, 5),
    (replace(SHORT, offload=True), replace(THIN, layers=3), 1, 5 * 4096 + 2 * (3 * 768 + 1024) + 1024 + 3 * 7 * 512, 4),
    # three frames wait in 8 bits, 5,120 bytes each, while a fourth is stored in 3,074. It is trained on 1,024 tokens, which make 28
    # centroids: 28 * 8 + 4 * 8 for K as for V, and as much for the codebook that follows
    (replace(LARGE, sink_frames=0), EVEN, 1, 5 * 8192 + 3 * 5120 + 3074 + 2 * 2 * 256, 4)])
def test_a_budget_counts_codebooks_and_what_waits_for_them(settings, geometry, chunk, count, frames):
    assert frames_within(settings, geometry, chunk, count) == frames
    assert frames_within(settings, geometry, chunk, count - 1) == frames - 1


@pytest.mark.parametrize(("changes", "chunk", "frames"), [
    # all sinks but the last, or all that are recent and the chunk of which one frame settles
    ({}, 3, 2), ({"sink_frames": 5}, 1, 4), ({"sink_frames": 0}, 3, 5), ({"sink_frames": 0}, 1, 3), ({"sink_bits": 16}, 3, 5),
    ({"sink_frames": 0, "recent_frames": 0}, 3, 0), ({"key": TensorSettings(stages=0), "value": TensorSettings(centroids=7)}, 3, 0)])
def test_frames_that_wait(changes, chunk, frames):
    assert codebooks.waiting_frames(replace(LARGE, **changes), EVEN, chunk) == frames


@pytest.mark.parametrize(("changes", "waits"), [
    ({}, True), ({"key": TensorSettings(bits=8)}, True), ({"key": TensorSettings(stages=0), "value": TensorSettings(bits=16)}, False),
    ({"key": TensorSettings(centroids=7), "value": TensorSettings(centroids=7)}, False),
    ({"key": TensorSettings(centroids=7), "value": TensorSettings(centroids=8)}, True)])
def test_whether_a_frame_may_be_too_little(changes, waits):
    """256 tokens make 7 centroids."""
    assert codebooks.may_wait(replace(LARGE, **changes), EVEN) is waits
    assert codebooks.may_wait(QVGSettings(codec="paper", sink_frames=0, recent_frames=0), EVEN) is False


PAPER = QVGSettings(codec="paper", sink_frames=0, recent_frames=0)


@pytest.mark.parametrize(("settings", "chunk", "life", "pool"), [
    (QVGSettings(), 3, 6, 8), (QVGSettings(), 1, 4, 4), (QVGSettings(codebook_frames=5), 3, 5, 8), (QVGSettings(sink_frames=9), 3, 6, 12),
    (QVGSettings(recent_frames=0), 3, 3, 6), (QVGSettings(sink_frames=0, recent_frames=0), 2, 2, 3), (QVGSettings(recent_bits=2), 3, 3, 8),
    (QVGSettings(recent_bits=3, value=TensorSettings(bits=3)), 3, 3, 8),
    (replace(PAPER, codebook_frames=4), 3, 6, 3), (replace(PAPER, codebook_frames=1), 3, 3, 3),
    (replace(PAPER, codebook_frames=6), 3, 6, 3)])
def test_how_long_a_codebook_serves_at_least_and_what_it_is_trained_on(settings, chunk, life, pool):
    """Until what is recent settles, where that holds bits to spare; otherwise for a chunk. All that is recent, and the chunk that comes."""
    assert (codebooks.shortest_life(settings, chunk), codebooks.pool_frames(settings, chunk)) == (life, pool)


@pytest.mark.parametrize(("window", "cap", "found"), [(0, None, None), (4, None, 4), (0, 5, 5), (4, 5, 4), (5, 4, 4)])
def test_what_limits_a_history(window, cap, found):
    assert ageing.window_of(replace(BARE, window_frames=window), Limits(None, cap)) == found
