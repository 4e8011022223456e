"""A segment of Continue Video (LongCat, QVG) over several GPUs: a sampler of core's takes its steps, all ranks predict."""

from __future__ import annotations

import math

import torch
from comfy.patcher_extension import WrappersMP

from ...qvg.video.rank_plans import SegmentPlan
from ..adapters import longcat
from ..adapters.longcat_given import Hook
from .checks import weights_of
from .mark import KEY, Split
from .runs import ROOM, ComfyLeader, SplitRun, embedding, split_run


class Predicted:
    """A guider as core's samplers call it, whose predictions all ranks make."""

    def __init__(self, guider, leader: ComfyLeader, first: int):
        self.guider, self.leader, self.first = guider, leader, first

    def __getattr__(self, name: str):
        return getattr(self.guider, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict | None = None, seed: int | None = None) -> torch.Tensor:
        if (model_options or {}).get("sampler_post_cfg_function"):
            raise ValueError("This sampler asks for the prediction of each prompt, which several GPUs do not give. Connect KSamplerSelect "
                             "with euler, or take the MODEL from before Split over GPUs (QVG).")
        return self.leader.denoise(x, float(sigma[0]), self.first, prompt_frame=self.first, store=False)


class SplitHook(Hook):
    """A `Hook` whose given frames all ranks keep, each for its heads; there may be none."""

    def __init__(self, latents: torch.Tensor, model, split: Split):
        super().__init__(latents, longcat.settings_of(model), longcat.log_of(model), split.shares)
        self.split = split

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        given = self.latents.shape[2]
        with split_run(guider, self.split, (noise.shape[3] // 2, noise.shape[4] // 2), 1, self.log.say) as run:
            self.shares = run.size
            self.check_memory(guider.inner_model, noise.shape[2], run.free.device, ROOM)
            with run.leader(self._plan(run, guider, noise.shape[2])) as leader:
                if given:
                    leader.remember([guider.inner_model.process_latent_in(self.latents).cpu()])
                made = executor(Predicted(guider, leader, given), sigmas, extra_args, callback, noise, *args, **kwargs)
                self.log.note(leader.stats)
                return made

    def _reading(self, guider) -> dict:
        # ranks attend by themselves
        return super()._reading(guider) | {"workspace_limit": None}

    def _plan(self, run: SplitRun, guider, new: int) -> SegmentPlan:
        texts = of_one_length([embedding(guider.conds[name][0]).cpu() for name in weights_of(guider)])
        return SegmentPlan(*run.named, self.settings, run.grid, max(1, self.latents.shape[2]), new, *texts, cfg=guider.cfg)

    def install(self, patched) -> None:
        super().install(patched)
        # of the mark, which refuses samplers that do not ask the ranks
        patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)


def of_one_length(texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Embeddings [1, L, C], repeated as core does, which changes nothing that attends to them."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return [text.repeat(1, length // text.shape[1], 1) for text in texts]


def split_segment(model, split: Split, given: torch.Tensor | None, shape) -> object:
    """A clone of LongCat-Video whose sampling runs are over the GPUs of a split, and continue `given` latents, if any, in the scale of the
    VAE. shape: [B, C, F, H, W] of the new latents."""
    patched = model.clone()
    SplitHook(torch.empty(*shape[:2], 0, *shape[3:]) if given is None else given, model, split).install(patched)
    return patched
