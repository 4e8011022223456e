"""The control of a closed loop: exact keys and values, off by a thousandth.

Videos of an autoregressive model drift apart however small the first difference is. A cache whose elements are off by 1e-3 of their
tensor's standard deviation, about what bf16 rounds off, shows how much of a drift is this and not the fault of a codec.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..codec import PlainCodec, PlainSpan
from ..registry import CODECS
from ..settings import PRESETS

DEVIATION = 1e-3


class NoiseCodec(PlainCodec):
    """16 bits, with normal noise of `DEVIATION` of the standard deviation of the tensor. The noise follows from the tensor alone, so a run
    can be repeated."""

    name, widths = "noise", (16,)

    def _encode_one(self, x: Tensor, tensor, bits: int, codebook) -> PlainSpan:
        exact = x.float()
        seed = int(exact.sum().view(torch.int32))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        return PlainSpan((exact + DEVIATION * exact.std() * noise).to(x.dtype))


CODECS.register(NoiseCodec())
NOISY = replace(PRESETS["off"], name="1e-3 noise", codec=NoiseCodec.name)
