"""The job table of `decode`: one row of addresses, sizes and strides for each span.

Spans of one `Kind` share a launch; their lengths, codebooks and positions differ only in their rows. `reader` rebuilds only the rows of
spans that changed, and holds spans weakly, so that their memory is freed when the cache evicts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# kinds of spans
PLANES, PAPER, INT8, PLAIN, TRANSFORM = (tl.constexpr(kind) for kind in range(5))

# columns of a row: addresses, then sizes and positions, then strides in elements
DATA = tl.constexpr(0)  # of up to four planes, or of packed codes, plain values or words in the first
SCALES = tl.constexpr(4)
ZEROS = tl.constexpr(5)
IDS = tl.constexpr(6)
CENTROIDS = tl.constexpr(7)
CENTROID_SCALE = tl.constexpr(8)
CHANNEL_SCALE = tl.constexpr(9)
EXPONENTS = tl.constexpr(10)
FRAMES = tl.constexpr(11)  # of the span
START = tl.constexpr(12)  # its first token in the workspace
IS_VALUE = tl.constexpr(13)
FRAME = tl.constexpr(14)  # position of its first frame
DATA_STRIDES = tl.constexpr(15)  # token, row
SCALE_STRIDES = tl.constexpr(17)  # token, row
ID_STRIDES = tl.constexpr(19)  # stage, token, row
CENTROID_STRIDES = tl.constexpr(22)  # stage, row
MEAN = tl.constexpr(24)  # an address
VECTORS = tl.constexpr(25)  # words of the matrices before the span's (`bit_vectors`)
COLUMNS = tl.constexpr(26)


@dataclass(frozen=True)
class Kind:
    """What a span's kernel is compiled for.

    code: PLANES, PAPER, INT8, PLAIN or TRANSFORM, for which `bits` is the number of words. groups: scales of a token. zeros: whether a
    group has a zero point (paper, asymmetric).
    """

    code: int
    bits: int = 0
    stages: int = 0
    groups: int = 1
    zeros: bool = False


def send(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a table to the device. A copy from pageable memory would wait for all queued work."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def address(job, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer from the job table. torch aligns its allocations, which the compiler cannot know."""
    return tl.multiple_of(tl.load(job + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def span_addresses(job, row, DTYPE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Where a row of a span lies, with strides in elements: (first plane or data, three more planes, token stride),
    (scales, zero points, token stride), (ids, token stride, stage stride), (centroids, stage stride)."""
    data_token = tl.load(job + DATA_STRIDES)
    data_row = row * tl.load(job + DATA_STRIDES + 1)
    if KIND == PLAIN:
        data = address(job, DATA, DTYPE) + data_row
    elif KIND == INT8:
        data = address(job, DATA, tl.int8) + data_row
    else:
        data = address(job, DATA, tl.uint8) + data_row
    scales, zeros, scale_token = data, data, 0
    if KIND != PLAIN:
        scale_token = tl.load(job + SCALE_STRIDES)
        scale_row = row * tl.load(job + SCALE_STRIDES + 1)
        scales = address(job, SCALES, tl.bfloat16 if KIND == INT8 else tl.uint8) + scale_row
        if HAS_ZEROS:
            zeros = address(job, ZEROS, tl.uint8) + scale_row
    ids, id_token, id_stage, centroids, centroid_stage = data, 0, 0, data, 0
    if STAGES > 0:
        id_token = tl.load(job + ID_STRIDES + 1)
        id_stage = tl.load(job + ID_STRIDES)
        ids = address(job, IDS, tl.uint8) + row * tl.load(job + ID_STRIDES + 2)
        centroid_stage = tl.multiple_of(tl.load(job + CENTROID_STRIDES), 16)
        centroid_row = row * tl.multiple_of(tl.load(job + CENTROID_STRIDES + 1), 16)
        centroids = address(job, CENTROIDS, tl.bfloat16 if KIND == PAPER else tl.uint8) + centroid_row
    plane1, plane2, plane3 = data, data, data
    if KIND == PLANES:
        plane1 = address(job, DATA + (1 if BITS > 1 else 0), tl.uint8) + data_row
        plane2 = address(job, DATA + (2 if BITS > 2 else 0), tl.uint8) + data_row
        plane3 = address(job, DATA + (3 if BITS > 3 else 0), tl.uint8) + data_row
    return (data, plane1, plane2, plane3, data_token), (scales, zeros, scale_token), (ids, id_token, id_stage), (centroids, centroid_stage)
