"""A run of AR Video Sampler (QVG) over several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ...qvg.settings import QVGSettings
from ...qvg.video import Run
from ...qvg.video.rank_plans import Plan
from ..adapters.causal import SCHEDULE
from ..memory_check import Memory
from .checks import weights_of
from .mark import Split
from .runs import ComfyLeader, SplitRun, embedding, split_run


class CausalRun:
    """One run. size: of ranks; free: see `SplitRun`. guider: of core, during a run. batch: videos that it makes."""

    def __init__(self, run: SplitRun, guider, batch: int):
        self.run, self.batch, self.size = run, batch, run.size
        self.free: Memory = run.free
        self.prompts = [(weight, entries(guider.conds[name][0], batch)) for name, weight in weights_of(guider).items()]

    def model(self, settings: QVGSettings, run: Run, position_limit: int) -> AbstractContextManager[ComfyLeader]:
        """See `SplitRun.leader`."""
        return self.run.leader(Plan(*self.run.named, settings, run, self.run.grid, self.batch, self.prompts, position_limit))


@contextmanager
def causal_run(guider, split: Split, shape, say: Callable[[str], None]) -> Iterator[CausalRun]:
    """A run over the GPUs of a split. shape: [B, C, F, H, W] of the latents. say, errors: as for `split_run`."""
    with split_run(guider, split, (shape[3] // 2, shape[4] // 2), len(weights_of(guider)), say) as run:
        yield CausalRun(run, guider, shape[0])


def entries(cond: dict, batch: int) -> list[tuple[int, torch.Tensor, str]]:
    """A condition of core's as what `rank_plans.Prompts` takes, on the CPU."""
    own = embedding(cond)
    given = [(0, None, ""), *(cond.get(SCHEDULE) or [])]
    return [(first, (own if other is None else other).expand(batch, -1, -1).cpu(), name) for first, other, name in given]
