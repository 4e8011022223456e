"""From a job to a sampler with its KV caches, and how much memory these may take."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention.choice import packs
from ..cache.kv_cache import KVCache
from ..models import Family
from ..models.wan import WAN, CausalWan
from ..settings import QVGSettings
from ..units import GIB
from .network import CachedNetwork, Condition, Model, check_positions, guided
from .run import Run
from .sampler import Sampler
from .schedule import PromptTrack
from .segment_model import SegmentModel, segment_cache
from .walk_job import WalkInputs, WalkJob
from .walk_model import walk_of

if TYPE_CHECKING:
    from .job import Job

# the share of free memory that is left to everything but the cache
MARGIN = 0.2


def free_bytes(device: str) -> int:
    """Free memory on a device or on the host; 0 if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def auto_budget(device: str) -> float:
    """GiB that a cache may take so that it always fits: what is free now, less a margin."""
    return free_bytes(device) * (1 - MARGIN) / GIB


def cache_of(network: CausalWan, settings: QVGSettings, run: Run, grid: tuple[int, int], *, batch: int = 1, device="cpu",
             dtype: torch.dtype | None = None, family: Family = WAN, heads: int = 0, **more) -> KVCache:
    """A cache for a run of a network.

    grid: tokens (height, width) of a latent frame. dtype: of unquantized and decoded values, the network's own by default. family: whose
    positions the keys get when they are read. heads: that it keeps, 0 for all. more: for `KVCache`.
    """
    sizes = network.sizes
    return KVCache(settings, layers=sizes.layers, heads=heads or sizes.heads, head_dim=sizes.head_dim, grid=grid, rope=family.rope,
                   batch=batch, device=device, dtype=dtype or network.dtype, max_frames=run.frames, chunk_frames=run.chunk_frames,
                   packs=packs(settings, device, head_dim=sizes.head_dim), **more)


def prepare(network: nn.Module, embed: Callable[[str], Tensor] | WalkInputs, job: Job | WalkJob, start: Tensor | None = None) -> Sampler:
    """A sampler for a job; arguments and errors as for `model_of`. embed: for a walk, its inputs. start: latents [1, C, n, H, W] to begin
    with, not of a walk."""
    of = walk_of if isinstance(job, WalkJob) else segments_of if job.given else model_of
    return sampler_of(of(network, embed, job), network, job, start)


def sampler_of(model: Model, network: nn.Module, job: Job | WalkJob, start: Tensor | None) -> Sampler:
    return Sampler(model, job.run, (1, network.sizes.channels, *job.latent), start=start, device=job.device)


@torch.no_grad()
def model_of(network: CausalWan, embed: Callable[[str], Tensor], job: Job, *, heads: int = 0, make: Callable = CachedNetwork,
             **more) -> CachedNetwork:
    """The model of a job, with its caches.

    embed: from a prompt to a text embedding [1, tokens, channels]. heads, more: see `cache_of`. make: called as `CachedNetwork` is.
    Raises ValueError if settings, budget or positions do not fit the network and the run.
    """
    run = job.run
    check_positions(job.settings, run, job.position_limit)

    @torch.no_grad()
    def project(text: str):
        return network.project_context(embed(text).to(job.device))

    def cache() -> KVCache:
        return cache_of(network, settings, run, job.grid, device=job.device, heads=heads, **more)

    prompt = PromptTrack(job.schedule, project, job.frame_rate)
    guides = job.cfg != 1
    settings = replace(job.settings, budget_gib=job.settings.budget_gib / (1 + guides), host_gib=job.settings.host_gib / (1 + guides))
    if guides:
        conditions = guided(prompt, cache(), project(job.negative), cache(), job.cfg)
    else:
        conditions = [Condition(prompt, cache())]
    return make(network, conditions, position_limit=job.position_limit)


@torch.no_grad()
def segments_of(network: nn.Module, embed: Callable[[str], Tensor], job: Job, *, make: Callable = SegmentModel, **more) -> SegmentModel:
    """The model of a job whose chunks are segments; arguments and errors as for `model_of`. make: called as `SegmentModel` is."""
    def text(prompt: str) -> Tensor:
        return embed(prompt).to(job.device)

    cache = segment_cache(network, job.settings, job.grid, given=job.given, new=job.run.chunk_frames, device=job.device, **more)
    return make(network, PromptTrack(job.schedule, text, job.frame_rate), cache, given=job.given, cfg=job.cfg,
                negative=text(job.negative) if job.cfg != 1 else None)
