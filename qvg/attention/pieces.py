"""Attention to a long history a piece at a time: softmax over parts, joined by their log-sum-exp.

    running = Running()
    for keys, values in pieces:
        running.add(*partial(q, keys, values))
    out = running.result(q.dtype)

Attention to all keys is a mean of the attentions to disjoint parts, weighed by the sums of their exponentials. So the history is never
decoded as a whole, and the workspace does not grow with the length of a video. The result differs from one attention to everything by the
rounding of each part's output. Source: FlashAttention (arXiv 2205.14135), section 3.1; joining as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor

# elements of logits computed at a time where no kernel returns the log-sum-exp
LOGITS = 1 << 24


def partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, D] to k and v [B, N, H, D], one dtype: the output [B, T, H, D] and the log-sum-exp [B, T, H] float32."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[:2]
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    else:
        out, lse = _plain(*heads_first)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, a few queries at a time; [B, H, T, D] in, and [B, H, T, D] and [B, H, T] out."""
    outs, sums = [], []
    step = max(1, LOGITS // max(1, k[..., 0].numel()))
    for part in q.split(step, dim=2):
        logits = part.float() @ k.float().mT * q.shape[-1] ** -0.5
        sums.append(logits.logsumexp(-1))
        outs.append((logits - sums[-1][..., None]).exp().to(v.dtype) @ v)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


class Running:
    """The attention of queries [B, T, H, D] to what has been added so far, in float32."""

    def __init__(self):
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Join the attention to another part, as `partial` returns it. A part without keys changes nothing."""
        if self._out is None:
            self._out, self._lse = out.float(), lse
            return
        joined = torch.logaddexp(self._lse, lse)
        self._out = self._out.mul_((self._lse - joined).exp_()[..., None]).addcmul_(out.float(), (lse - joined).exp_()[..., None])
        self._lse = joined

    def result(self, dtype: torch.dtype) -> Tensor:
        return self._out.to(dtype)
