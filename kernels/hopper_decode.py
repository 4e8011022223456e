"""`decode_transform` for NVIDIA's Hopper and a bf16 workspace.

A warp decodes 16 tokens at a time, and a program 64 or 128. The vectors of a head stay in shared memory for all tokens of a program. A word
of a token, 16 bits, is one step of a product. A product depends neither on the order of bits nor on that of columns. So in the order of
`bit_vectors` a thread's bits lie side by side in a word, and a multiplication and a logical operation make two elements of the operand; and
a thread's sums are whole octets of channels, which it rotates and stores without an exchange.

Written in Gluon, which Triton has in this form in 3.5 to 3.9; without it `decode_transform` uses the kernel for any GPU. Triton's
interpreter cannot run it.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from . import halves, jobs, octets, tiles
from .hopper import barrier
from .hopper_layouts import channels_of, octet_layout, sign_layout
from .hopper_pairs import opaque_zero, pair_of
from .jobs import COLUMNS, DATA, EXPONENTS, FRAME, FRAMES, IS_VALUE, MEAN, SCALES, START, VECTORS

_address, _octets, _power_of_two, _unpair = (
    gluon.jit(function.fn) for function in (jobs.address, octets.octets, tiles.power_of_two, halves.unpair))


@dataclass(frozen=True)
class Cut:
    """How a launch is cut. tokens: of a tile. ahead: words of a token that are loaded during the tile before. group: words after which the
    kernel waits for products, whose operands stay in registers until then. registers: the limit that a thread has."""

    tokens: int
    ahead: int
    group: int
    registers: int | None

    @staticmethod
    def of(words: int) -> Cut:
        if words <= 12:
            return Cut(64, words, words, 168)
        # the vectors of more words leave room for few programs, which have more warps instead
        return Cut(64, 8, 8, 168) if words <= 20 else Cut(128, 8, 8, None)

    @property
    def constants(self) -> dict[str, int | None]:
        """Of the kernel."""
        return {"T": self.tokens, "AHEAD": self.ahead, "GROUP": self.group}


@gluon.jit
def _load_words(words, tokens, local, FIRST: gl.constexpr, LAST: gl.constexpr):
    """The words FIRST to LAST - 1 of tokens, uint16 [T] each."""
    found = ()
    for word in gl.static_range(FIRST, LAST):
        found = found + (gl.load(words + word * tokens + local),)
    return found


@gluon.jit
def _prefetch(words, scales, tokens, places, span_frames, first, share, WORDS: gl.constexpr, T: gl.constexpr):
    """Bring words and scales of this program into the L2 cache. While stores keep the memory busy, loads take longer than the computation
    of one tile. A warp requests those of 64 tokens, a thread a word of them."""
    thread = gl.arange(0, 2 * T, layout=gl.BlockedLayout([1], [32], [T // 16], [0]))
    width = share * (T // 64)
    for start in range(0, width * span_frames, T // 16):
        index = start + thread // 32
        at = gl.minimum(index // width, span_frames - 1) * places + gl.minimum(first + index % width * 64, places - 1)
        line = words + (gl.minimum(thread % 32, WORDS - 1) * tokens + at)
        gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[line.to(gl.int64)], dtype=gl.int32,
                                  is_pure=False, pack=1)
        gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[(scales + at).to(gl.int64)], dtype=gl.int32,
                                  is_pure=False, pack=1)


@gluon.jit
def _load_vectors(vectors, WORDS: gl.constexpr, D: gl.constexpr, T: gl.constexpr):
    """The vectors of every word, bf16 [16, D], in shared memory."""
    # a warp holds 256 elements at a time
    HIGH: gl.constexpr = min(T // 16, D // 16)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [HIGH, T // 16 // HIGH], [1, 0])
    at = vectors + (gl.arange(0, 16, layout=gl.SliceLayout(1, L))[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, L))[None, :])
    tables = ()
    for first in gl.static_range(0, WORDS, 8):
        # loaded eight at a time, before the first is stored
        found = ()
        for word in gl.static_range(first, min(first + 8, WORDS)):
            found = found + (gl.load(at + word * (16 * D)),)
        for word in gl.static_range(first, min(first + 8, WORDS)):
            table = gl.allocate_shared_memory(gl.bfloat16, (16, D), gl.NVMMASharedLayout(128, 16, 2))
            table.store(found[word - first])
            tables = tables + (table,)
    return tables


@gluon.jit
def _product(held, words, tokens, local, turn, tables, WORDS: gl.constexpr, AHEAD: gl.constexpr, GROUP: gl.constexpr,
             D: gl.constexpr, T: gl.constexpr):
    """Bits times their vectors, float32 [T, D], octets in the registers of a thread. held: the first AHEAD words."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[T // 16, 1], instr_shape=[16, D, 16])
    tile = gl.full((T, D), 0.0, gl.float32, MMA)
    held = held + _load_words(words, tokens, local, AHEAD, WORDS)
    for word in gl.static_range(WORDS):
        # a set bit in the place of a sign makes 1 of -1
        pairs = ((held[word].to(gl.int32)[:, None] * turn[None, :]) & -2147450880) ^ -1082081408
        operand = gl.convert_layout(channels_of(pairs, T, 16), gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2))
        tile = warpgroup_mma(operand, tables[word], tile, use_acc=word > 0, is_async=word < WORDS - 1 and word % GROUP != GROUP - 1)
    return gl.reshape(gl.permute(gl.reshape(tile, (T, D // 32, 4, 4, 2)), (0, 1, 3, 2, 4)), (T, D))


@gluon.jit
def _rotate(even, odd, angle):
    """RoPE on a channel pair. angle: (cos, sin) as a pair of float16."""
    cos, sin = _unpair(angle, True)
    return even * cos - odd * sin, even * sin + odd * cos


@gluon.jit(do_not_specialize=["first_job", "first_head", "all_heads", "origin", "frames", "places", "share"])
def decode_kernel(
    jobs, vectors, angles, keys, values,
    first_job, first_head, all_heads, batches, batch_stride, token_stride, head_stride, origin, frames, places, share,
    WORDS: gl.constexpr, T: gl.constexpr, AHEAD: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, TIME: gl.constexpr,
):
    """As `decode_transform.decode_transform_kernel`, with angles in float16. T, AHEAD, GROUP: see `Cut`."""
    P: gl.constexpr = sign_layout(T)
    job = jobs + (first_job + gl.program_id(2) // batches) * COLUMNS
    span_frames = gl.load(job + FRAMES).to(gl.int32)
    batch, head = gl.program_id(2) % batches, gl.program_id(1)
    row = (batch * all_heads + first_head + head).to(gl.int64)
    tokens = span_frames * places
    is_value = gl.load(job + IS_VALUE) != 0
    out = gl.multiple_of(gl.where(is_value, values.to(gl.int64), keys.to(gl.int64)).to(gl.pointer_type(gl.bfloat16)), 16)
    out += batch.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride + gl.load(job + START) * token_stride
    words = _address(job, DATA, gl.uint16) + row * WORDS * tokens
    scales = _address(job, SCALES, gl.uint8) + row * tokens
    unit = _power_of_two(gl.load(_address(job, EXPONENTS, gl.int8) + row))
    first_frame = gl.load(job + FRAME).to(gl.int32) + origin
    line, lines = batch * gl.num_programs(1) + head, batches * gl.num_programs(1)
    vectors += (gl.load(job + VECTORS) * lines + line * WORDS) * (16 * D)

    within = gl.arange(0, T, layout=gl.SliceLayout(1, P))
    pair = gl.arange(0, 8, layout=gl.SliceLayout(0, P))
    # moves the bits of a pair to the places of two signs
    turn = 0x20001 << ((pair & 3) * 4 + (pair >> 2) * 2)
    first, frame = gl.program_id(0) * (share * T), 0
    _prefetch(words, scales, tokens, places, span_frames, first, share, WORDS, T)
    local = gl.minimum(first + within, places - 1)
    held = _load_words(words, tokens, local, 0, AHEAD)
    code = gl.load(scales + local)
    tables = _load_vectors(gl.multiple_of(vectors, 16), WORDS, D, T)
    channel = gl.arange(0, D, layout=gl.BlockedLayout([1], [32], [T // 16], [0]))
    mean = gl.allocate_shared_memory(gl.float32, (1, D), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mean.index(0).store(gl.load(_address(job, MEAN, gl.float32) + row * D + channel))
    fence_async_shared()
    barrier()
    for _ in range(gl.minimum(share, gl.cdiv(places - first, T)) * span_frames):
        x = _product(held, words, tokens, local, turn, tables, WORDS, AHEAD, GROUP, D, T)
        scale = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit
        place, at = local - frame * places, local
        # the same tile of every frame before the next tile, so that the angles of its places stay in the cache
        more = frame + 1 < span_frames
        first = gl.where(more, first, first + T)
        next_frame = gl.where(more, frame + 1, 0)
        local = next_frame * places + gl.minimum(first + within, places - 1)
        held = _load_words(words, tokens, local, 0, AHEAD)
        code = gl.load(scales + local)

        X: gl.constexpr = x.type.layout
        # loaded again for every tile; there are no registers for it
        add = mean.index(opaque_zero()).load(gl.SliceLayout(0, X))
        x0, x1, x2, x3, x4, x5, x6, x7 = _octets(x * gl.convert_layout(scale, gl.SliceLayout(1, X))[:, None] + add[None, :], T, D)
        if not is_value:
            OCTET: gl.constexpr = x0.type.layout
            octet = gl.arange(0, D // 8, layout=gl.SliceLayout(0, OCTET))[None, :]
            of_time = (first_frame + frame) * (D // 4)
            of_place = gl.convert_layout((frames + place) * (D // 4), gl.SliceLayout(1, OCTET))[:, None]
            # the boundary may fall between the second and the third of an octet's four pairs
            left = gl.load(angles + (gl.where(4 * octet < TIME, of_time, of_place) + octet))
            right = gl.load(angles + (gl.where(4 * octet + 2 < TIME, of_time, of_place) + octet + D // 8))
            x0, x1 = _rotate(x0, x1, left.to(gl.int32))
            x2, x3 = _rotate(x2, x3, (left >> 32).to(gl.int32))
            x4, x5 = _rotate(x4, x5, right.to(gl.int32))
            x6, x7 = _rotate(x6, x7, (right >> 32).to(gl.int32))
        found = gl.join(gl.join(pair_of(x0, x1), pair_of(x4, x5)), gl.join(pair_of(x2, x3), pair_of(x6, x7)))
        W: gl.constexpr = octet_layout(T, D)
        found = gl.convert_layout(gl.reshape(found, (T, D // 2)), W)
        to = (out + gl.convert_layout(at, gl.SliceLayout(1, W)).to(gl.int64)[:, None] * token_stride).to(gl.pointer_type(gl.int32))
        gl.store(to + gl.arange(0, D // 2, layout=gl.SliceLayout(0, W))[None, :], found, cache_modifier=".cs")
        frame = next_frame
