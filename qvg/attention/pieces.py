"""Attention to a long history a piece at a time: softmax over parts, joined by their log-sum-exp.

    running = Running()
    for keys, values in pieces:
        running.add(*partial(q, keys, values))
    running.finish(out)

Attention to all keys is a mean of the attentions to disjoint parts, weighed by the sums of their exponentials. So the history is never
decoded as a whole, and the workspace does not grow with the length of a video. The result differs from one attention to everything by the
rounding of each part's output. Source: FlashAttention (arXiv 2205.14135), section 3.1; joining as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from .. import backends

# elements of logits computed at a time where no kernel returns the log-sum-exp
LOGITS = 1 << 24
# compute capability from which cuDNN's attention is faster than torch's flash attention: on an H200 a layer of 180 frames in pieces within
# 96 MiB took 24.0 ms instead of 29.8 (`python -m comfyui_qvg.benchmarks.pieces`)
CUDNN_FROM = (9, 0)
# (device, head dim, dtype) of what cuDNN could not attend to
_refused: set[tuple] = set()


def partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, D] to k and v [B, N, H, D], one dtype: the output [B, T, H, D] and the log-sum-exp [B, T, H] float32."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        found = by_cudnn(*heads_first) if _cudnn_is_faster(q.device) and torch.backends.cuda.cudnn_sdp_enabled() else None
        out, lse = found or torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[:2]
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    else:
        out, lse = _plain(*heads_first)
    return out.transpose(1, 2), lse.transpose(1, 2)


@lru_cache
def _cudnn_is_faster(device: torch.device) -> bool:
    return (torch.version.hip is None and torch.cuda.get_device_capability(device) >= CUDNN_FROM
            and hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention") and hasattr(torch.backends.cuda, "cudnn_sdp_enabled"))


def by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Attention by cuDNN, shapes as in `_plain`, or None where it has none. What failed once is not tried again."""
    kind = q.device, q.shape[-1], q.dtype
    if kind in _refused or q.shape[-1] > 128 or q.shape[-1] % 8 or not q.shape[2] or not k.shape[2]:
        return None
    try:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    except RuntimeError as error:
        if backends.ran_out(error):
            raise
        _refused.add(kind)
        logging.info("QVG: pieces of a history are attended to without cuDNN, in heads of %d channels in %s on %s: %s", q.shape[-1],
                     q.dtype, q.device, backends.sentence_of(error))
        return None
    return out, lse[..., 0] if lse.ndim == 4 else lse


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
        self._owned = False  # whether what is joined is written over; the first part stays as it came

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Join the attention to another part, as `partial` returns it. A part without keys changes nothing."""
        if self._out is None:
            self._out, self._lse = out, lse
            return
        total, joined = self._out if self._owned else _empty(out), _empty(lse)
        join(self._out, self._lse, out, lse, total, joined)
        self._out, self._lse, self._owned = total, joined, True

    def finish(self, target: Tensor, *last: Tensor) -> None:
        """Write the result to `target`, [B, T, H, D] in any dtype. last: one more part, which is joined on the way."""
        if last and self._out is not None:
            join(self._out, self._lse, *last, target, _empty(self._lse))
        else:
            target.copy_(last[0] if last else self._out)

    def result(self, dtype: torch.dtype) -> Tensor:
        return self._out.to(dtype)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Attention to two disjoint parts of the keys, [B, T, H, D] with log-sum-exps [B, T, H] float32, joined to `out` and `lse`.

    out: in any dtype; it may be `first`, but lse is other memory than theirs. A part without keys has a log-sum-exp of -inf, and what it
    holds is ignored.
    """
    backends.run("join", _join, first, first_lse, second, second_lse, out, lse)


def _join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    joined = torch.logaddexp(first_lse, second_lse)
    total = _weighed(first, first_lse, joined, first is out).add_(_weighed(second, second_lse, joined))
    if total is not out:
        out.copy_(total)
    lse.copy_(joined)


def _weighed(part: Tensor, lse: Tensor, joined: Tensor, in_place: bool = False) -> Tensor:
    """A part's share of the joined attention, in float32."""
    weight = (lse - joined).exp_()[..., None]
    total = part.mul_(weight) if in_place and part.dtype == torch.float32 else part.float() * weight
    return total.masked_fill_((lse == -torch.inf)[..., None], 0)
