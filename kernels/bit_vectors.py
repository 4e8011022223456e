"""What each bit of a token adds or subtracts, as the matrix that `decode_transform` multiplies with bits.

Reference: `qvg.codec.basis.bit_vectors`. The matrix is made anew for every read, of the heads that are read, because kept for every basis
and width it would take more memory than the spans. Making it takes a few microseconds.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported
from ..qvg.codec.basis import MOST_BITS, Basis
from ..qvg.codec.transform import TransformSpan
from ..qvg.codec.uniform import DEEPEST, amplitudes
from .jobs import address, send
from .tiles import round_to_bfloat16

# columns of a row: addresses, then words of a token, then those of all tables before
VECTORS, DEVIATION, REACH, ORDER, AMPLITUDES, WORDS, BEFORE, COLUMNS = (tl.constexpr(column) for column in range(8))


@triton.jit
def places(order, bit, count):
    """Of some bits [16] of a token with `count` bits: the component of each, its place among that component's bits, and how
    many those are."""
    component = tl.load(order + bit).to(tl.int32)
    counts = tl.zeros((16, 128), tl.int32)
    for start in range(0, count, 128):
        other = start + tl.arange(0, 128)[None, :]
        same = (tl.load(order + other).to(tl.int32) == component[:, None]) & (other < count)
        # both are counted in one number
        counts += tl.where(same, tl.where(other < bit[:, None], 0x10001, 1), 0)
    counts = tl.sum(counts, axis=1)
    return component, counts >> 16, counts & 0xFFFF


@triton.jit(do_not_specialize=["first_head", "heads", "all_heads"])
def bit_vectors_kernel(tables, out, first_head, heads, all_heads,
                       D: tl.constexpr, BITS: tl.constexpr, DEPTHS: tl.constexpr, TURNED: tl.constexpr):
    """The vectors of the 16 bits of one word to out [tables, batches x heads, N, D], N bits each; BITS of a basis's order.

    TURNED: rows and columns of a word in the order in which a thread of `hopper_decode` has them.
    Grid: (words, batches x heads, tables).
    """
    table = tables + tl.program_id(2) * COLUMNS
    word, line, words = tl.program_id(0), tl.program_id(1), tl.load(table + WORDS).to(tl.int32)
    # loads that depend on each other take most of the time, so all others come first
    vectors, deviation = address(table, VECTORS, tl.bfloat16), address(table, DEVIATION, tl.bfloat16)
    reach, order, amplitudes = address(table, REACH, tl.uint8), address(table, ORDER, tl.uint8), address(table, AMPLITUDES, tl.float32)
    before_all = tl.load(table + BEFORE)
    if word < words:
        row = (line // heads * all_heads + first_head + line % heads).to(tl.int64)
        place, channel = tl.arange(0, 16), tl.arange(0, D)
        bit, column = 16 * word + place, channel
        if TURNED:
            bit = 16 * word + 15 - (place & 6) * 2 - (place >> 3) * 2 - (place & 1)
            column = (channel & -31) + (channel & 6) * 4 + (channel & 24) // 4
        component, before, held = places(order + row * BITS, bit, 16 * words)
        vector = tl.load(vectors + (row * D + component)[:, None] * D + channel[None, :]).to(tl.float32)
        size = tl.load(deviation + row * D + component).to(tl.float32)
        half = tl.load(reach + row * D + component).to(tl.int32)
        amplitude = tl.load(amplitudes + (half * (DEPTHS + 1) + held) * DEPTHS + before) * size
        start = (before_all * tl.num_programs(1) + line * words + word) * 16
        at = (start + place)[:, None] * D + column[None, :]
        tl.store(out + at, round_to_bfloat16(amplitude[:, None] * vector).to(out.dtype.element_ty))


def require_contiguous(book: Basis) -> None:
    """Raises Unsupported unless the rows of a basis's tensors follow each other in memory."""
    if not all(getattr(book, name).is_contiguous() for name in book.__dataclass_fields__):
        raise Unsupported("the tensors of a basis are not contiguous in memory")


class BitVectors:
    """The matrices of some spans: one for every basis, number of words and gain among them. It keeps addresses, not tensors."""

    def __init__(self, head_dim: int, device: torch.device):
        self._head_dim, self._device = head_dim, device
        self._rows: dict[tuple[int, int, str], list[int]] = {}
        self._words = 0

    def add(self, span: TransformSpan) -> int:
        """Words of the matrices before that of this span."""
        book, words = span.codebook, span.words.shape[1]
        require_contiguous(book)
        key = id(book), words, span.gain
        if key not in self._rows:
            parts = book.vectors, book.deviation, book.reach, book.order, amplitudes_on(self._device, span.gain)
            self._rows[key] = [*(part.data_ptr() for part in parts), words, self._words]
            self._words += words
        return self._rows[key][BEFORE.value]

    def send(self) -> None:
        """Copy the table to the device, after the last `add`."""
        if self._rows:
            self._table = send(torch.tensor(list(self._rows.values()), dtype=torch.int64), self._device)
            self._most = max(row[WORDS.value] for row in self._rows.values())

    def make(self, batches: int, heads: slice, all_heads: int, turned: bool) -> Tensor:
        """[words of all, batches x heads, 16, D] for some heads; bf16, in the interpreter float32, because its products of bf16 are wrong.
        turned: in the order that `hopper_decode` needs."""
        count, dim = heads.stop - heads.start, self._head_dim
        out = torch.empty(self._words, batches * count, 16, dim, device=self._device,
                          dtype=torch.float32 if self._device.type == "cpu" else torch.bfloat16)
        if self._rows:
            bit_vectors_kernel[(self._most, batches * count, len(self._rows))](
                self._table, out, heads.start, count, all_heads, D=dim, BITS=MOST_BITS * dim, DEPTHS=DEEPEST, TURNED=turned, num_warps=4)
        return out


@lru_cache(maxsize=8)
def amplitudes_on(device: torch.device, gain: str) -> Tensor:
    """`qvg.codec.uniform.amplitudes` on a device."""
    return send(amplitudes(gain), device)
