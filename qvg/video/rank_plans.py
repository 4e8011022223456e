"""What all ranks must know of a video, from which each makes its model: of a causal model, of segments or of a walk.

    plan = Plan("wan", network.sizes, "a name", settings, run, grid, 1, prompts)
    model = plan.model(network, ranks, device)                  # on every rank, with caches of its heads

A plan goes from the first rank to the others (`rank_work.tell_plan`), so it is of plain data and of tensors on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.ranks import Cut, Ranks
from ..cache.kv_cache import KVCache
from ..models import FAMILIES
from ..settings import QVGSettings
from .cameras import CameraPath
from .network import Condition
from .ranks import RankedNetwork, RankedSegments, RankedWorld, rank_cache, rank_options
from .run import Run
from .segment_model import segment_cache
from .view_memory import ViewMemory
from .walk_job import WalkText
from .walk_model import cache_of_walk, scene_of
from .world import WorldCondition


class Prompts:
    """The prompts of a condition, see `Condition.prompt`. entries: (first latent frame, text embedding [B, L, C], name), rising."""

    def __init__(self, entries: Sequence[tuple[int, Tensor, str]], network: nn.Module):
        self.entries, self.network = entries, network
        self._projected: tuple[int, Any] = -1, None

    def _at(self, frame: int) -> int:
        return max((number for number, entry in enumerate(self.entries) if entry[0] <= frame), default=0)

    def name(self, frame: int) -> str:
        return self.entries[self._at(frame)][2]

    def context(self, frame: int):
        number = self._at(frame)
        if self._projected[0] != number:
            embedding = self.entries[number][1].to(next(self.network.parameters()).device)
            self._projected = number, self.network.project_context(embedding)
        return self._projected[1]


@dataclass(frozen=True)
class NetworkPlan(ABC):
    """What a plan says of the network. weights: what identifies them."""

    family: str
    sizes: Any
    weights: str

    @abstractmethod
    def model(self, network: nn.Module, ranks: Ranks, device):
        """This rank's model, with caches of its heads. Raises ValueError where the ranks do not divide heads or tokens."""


@dataclass(frozen=True)
class Plan(NetworkPlan):
    """Of a causal model.

    prompts: for each condition its weight in guidance and the entries of `Prompts`. grid: tokens (height, width) of a latent frame.
    """

    settings: QVGSettings
    run: Run
    grid: tuple[int, int]
    batch: int
    prompts: Sequence[tuple[float, Sequence[tuple[int, Tensor, str]]]]
    position_limit: int = 0

    def model(self, network: nn.Module, ranks: Ranks, device) -> RankedNetwork:
        conditions = [
            Condition(Prompts(entries, network), rank_cache(network, self.settings, self.run, self.grid, ranks, batch=self.batch,
                                                            device=device), weight) for weight, entries in self.prompts]
        return RankedNetwork(network, conditions, ranks, position_limit=self.position_limit)


@dataclass(frozen=True)
class SegmentPlan(NetworkPlan):
    """Of segments of `new` latent frames that continue at most `given`, at least one; see `SegmentModel`.

    prompt, negative: text embeddings [1, L, C] of one length; negative is None without guidance.
    """

    settings: QVGSettings
    grid: tuple[int, int]
    given: int
    new: int
    prompt: Tensor
    negative: Tensor | None = None
    cfg: float = 1.0

    def model(self, network: nn.Module, ranks: Ranks, device) -> RankedSegments:
        cache = segment_cache(network, self.settings, self.grid, given=self.given, new=self.new, device=device,
                              family=FAMILIES[self.family], **rank_options(network, ranks, device))
        return RankedSegments(network, self.prompt.to(device), cache, ranks, given=self.given, negative=self.negative, cfg=self.cfg)


@dataclass(frozen=True)
class WalkPlan(NetworkPlan):
    """Of a walk; see `WorldModel`.

    settings: of each cache. prompts: for each condition its weight in guidance, its text, and what SigLIP saw in the start image, or None
    (see `walk_job`). start: latents of the start image [1, C, 1, H, W] in the scale of the network.
    """

    settings: QVGSettings
    grid: tuple[int, int]
    path: CameraPath
    memory: str
    views: ViewMemory
    prompts: Sequence[tuple[float, WalkText, Tensor | None]]
    start: Tensor | None = None

    def model(self, network: nn.Module, ranks: Ranks, device) -> RankedWorld:
        start = None if self.start is None else Cut(ranks, self.grid).share(self.start).to(device)
        options = rank_options(network, ranks, device)

        def cache() -> KVCache:
            return cache_of_walk(network, self.settings, self.grid, memory=self.memory, views=self.views, frames=len(self.path),
                                 device=device, **options)

        conditions = [WorldCondition(scene_of(self.family, network, text, vision, self.path, start), cache(), weight)
                      for weight, text, vision in self.prompts]
        return RankedWorld(conditions, self.path, ranks, memory=self.memory, views=self.views, rope=FAMILIES[self.family].rope)
