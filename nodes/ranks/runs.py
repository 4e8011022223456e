"""A run over several GPUs: the first rank is ComfyUI's process, which samples, and a crew follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from ...qvg.attention.ranks import Cut, Ranks
from ...qvg.video.crew import Crew
from ...qvg.video.rank_plans import NetworkPlan
from ...qvg.video.ranks import Leader
from ..memory_check import Memory
from .checks import check_followed
from .crews import CREWS
from .mark import Split
from .network import heads_of, plain_network, weights_name

# what caches can have where there is least room
ROOM = "it can have {} on each GPU"


class ComfyLeader(Leader):
    """A `Leader` that ComfyUI can interrupt between two passes."""

    def __init__(self, model, ranks: Ranks, crew: Crew):
        super().__init__(model, ranks)
        self.crew = crew

    def denoise(self, x: torch.Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> torch.Tensor:
        if not store:
            # a finished chunk is still stored, so that it can be saved
            comfy.model_management.throw_exception_if_processing_interrupted()
        found = super().denoise(x, sigma, first, prompt_frame=prompt_frame, store=store)
        if store and x.device.type == "cuda":
            # a chunk counts once its last pass was computed by all
            torch.cuda.synchronize(x.device)
        self.crew.check()
        return found


class SplitRun:
    """One run. size: of ranks; free: what one cache may take, on the device that has least.

    guider: of core, during a run. grid: tokens (height, width) of a latent frame. caches: how many each rank has.
    Raises ValueError where the ranks do not divide heads or tokens.
    """

    def __init__(self, guider, crew: Crew, grid: tuple[int, int], caches: int):
        self.crew, self.size, self.grid = crew, crew.size, grid
        patcher = guider.model_patcher
        alone = Ranks(0, self.size)
        alone.heads(heads_of(guider.inner_model.diffusion_model))
        Cut(alone, grid)
        self.family, self.network = plain_network(patcher, crew.device)
        self.weights = weights_name(patcher)
        has, free = crew.prepare(self.weights)
        to_come = 0 if has else sum(tensor.nbytes for tensor in self.network.state_dict().values())
        least = min(free - to_come, comfy.model_management.get_free_memory(crew.device))
        host = comfy.model_management.get_free_memory(torch.device("cpu"))
        # processes on the CPU share its memory
        shares = caches * (1 if crew.on_gpu else self.size)
        self.free = Memory(max(0, least) // shares, host // (caches * self.size))

    @property
    def named(self) -> tuple:
        """What every plan begins with."""
        return self.family.name, self.network.sizes, self.weights

    @contextmanager
    def leader(self, plan: NetworkPlan) -> Iterator[ComfyLeader]:
        """The model of all ranks. Its caches are freed at the end. Raises RankEnded where a rank ends."""
        with self.crew.video(plan, self.network) as ranks:
            model = plan.model(self.network, ranks, self.crew.device)
            try:
                with ComfyLeader(model, ranks, self.crew) as leader:
                    yield leader
            finally:
                for cache in model.caches:
                    cache.free()


@contextmanager
def split_run(guider, split: Split, grid: tuple[int, int], caches: int, say) -> Iterator[SplitRun]:
    """A run over the GPUs of a split; grid and caches as for `SplitRun`. say: shows a line of text.

    Raises ValueError, before anything is started, for what other nodes set that cannot be followed.
    """
    check_followed(guider)
    with CREWS.use(split, guider.model_patcher.load_device, say) as crew:
        yield SplitRun(guider, crew, grid, caches)


def embedding(cond: dict) -> torch.Tensor:
    """The text embedding [1, L, C] of a condition of core's during a run."""
    return cond["model_conds"]["c_crossattn"].cond
