"""The closed loop of Measure Presets (QVG) through ComfyUI: a MODEL samples the same video with any settings of its KV cache.

Both classes are a `qvg.measure.rows.Loop`. Latents are compared in the network's scale, as those of `qvg bench quality --checkpoint` are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ..qvg.measure.inputs import cannot_walk
from ..qvg.measure.loop import Made, Progress, silent
from ..qvg.models.longcat_schedule import DISTILLED_STEPS, STEPS, noise_levels
from ..qvg.settings import QVGSettings
from ..qvg.video import SELF_FORCING_SIGMAS, Run
from .adapters.families import adapter_of, family_of
from .long_video import ARSampler, Options
from .run_log import ATTACHMENT
from .segments import CHANNELS, STRIDE

CHUNKS, SEGMENTS, GIVEN = 10, 3, 4


@dataclass
class Source:
    """What the node was given. frames, chunk_frames: 0 for the model's usual ones. sigmas: None for them."""

    model: object
    positive: list
    negative: list
    width: int
    height: int
    frames: int
    chunk_frames: int
    seed: int
    cfg: float
    sigmas: torch.Tensor | None

    def sample(self, model, sampler, frames: int, seed: int, callback: Callable) -> torch.Tensor:
        """New latents [1, C, frames, h, w] of a MODEL that was patched for its history."""
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.cfg)
        empty = torch.zeros(1, CHANNELS, frames, self.height // STRIDE, self.width // STRIDE,
                            device=comfy.model_management.intermediate_device())
        return guider.sample(comfy.sample.prepare_noise(empty, seed), empty, sampler, self.sigmas, callback=callback, disable_pbar=True,
                             seed=seed)

    def in_network_scale(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.model.process_latent_in(latents).float().cpu()


def loop_of(source: Source) -> CausalLoop | SegmentLoop:
    """The loop of the family of a MODEL. Raises ValueError for one without a KV cache, and for a size without whole tokens."""
    network = source.model.get_model_object("diffusion_model")
    family = family_of(network)
    if family is None:
        raise ValueError(f"{type(network).__name__} is not an autoregressive video model: it has no KV cache to measure. Load a "
                         "Self-Forcing or Causal-Forcing checkpoint, or LongCat-Video, with Load AR Video Model (QVG).")
    if source.width % 16 or source.height % 16:
        raise ValueError(f"A video of {source.width} x {source.height} pixels does not divide into tokens of 16 x 16. Set width and height "
                         "to multiples of 16.")
    if family.walks:
        raise ValueError(cannot_walk("The model", family))
    adapter = adapter_of(family)
    usual = next(iter(family.shapes.values()))
    # models that rebuild their context for every segment continue given frames
    if hasattr(adapter, "continue_from"):
        chunk = source.chunk_frames or usual.segment_frames - GIVEN
        shift = source.model.get_model_object("model_sampling").shift
        levels = noise_levels(STEPS, shift=shift) if source.cfg != 1 else noise_levels(DISTILLED_STEPS, distilled=True, shift=shift)
        return SegmentLoop(replace(source, chunk_frames=chunk, frames=source.frames or GIVEN + SEGMENTS * chunk,
                                   sigmas=levels if source.sigmas is None else source.sigmas), adapter)
    chunk = source.chunk_frames or usual.chunk_frames
    return CausalLoop(replace(source, chunk_frames=chunk, frames=source.frames or CHUNKS * chunk,
                              sigmas=torch.tensor(SELF_FORCING_SIGMAS) if source.sigmas is None else source.sigmas), adapter)


class Clock:
    """A callback of core's samplers: reports passes, and notes when each chunk or segment begins its second pass."""

    def __init__(self, steps: int, progress: Callable[[int], None]):
        self.steps, self.progress, self.begun, self.done = steps, progress, [], 0

    def __call__(self, step, denoised, x, total) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.done % self.steps == 0:
            denoised.flatten()[0].item()  # waits for the device
            self.begun.append(time.perf_counter())
        self.done += 1
        self.progress(self.done)

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.begun, self.begun[1:])]


class CausalLoop:
    """Core's causal Wan and its like through AR Video Sampler (QVG), chunk by chunk."""

    def __init__(self, source: Source, adapter):
        self.source, self.adapter = source, adapter
        self.sampler = ARSampler(Options(chunk_frames=source.chunk_frames, keep_partial=False))

    @property
    def lengths(self) -> Sequence[int]:
        source = self.source
        return list(Run(frames=source.frames, chunk_frames=source.chunk_frames).chunk_lengths(0, source.frames))

    def make(self, settings: QVGSettings, progress: Progress = silent) -> Made:
        source, steps = self.source, len(self.source.sigmas) - 1
        total = len(self.lengths) * steps
        clock = Clock(steps, lambda done: progress(done, total))
        model = self.adapter.quantize(source.model, settings)
        latents = source.sample(model, self.sampler, source.frames, source.seed, clock)
        return Made(source.in_network_scale(latents), model.get_attachment(ATTACHMENT).history[-1], clock.seconds)


class SegmentLoop:
    """LongCat-Video, segment by segment, carried as latents."""

    def __init__(self, source: Source, adapter):
        self.source, self.adapter = source, adapter
        self.first: torch.Tensor | None = None  # the first segment has no cache, so it is the same with all settings

    @property
    def lengths(self) -> Sequence[int]:
        source, first = self.source, min(self.source.frames, GIVEN + self.source.chunk_frames)
        return [first, *Run(frames=source.frames, chunk_frames=source.chunk_frames).chunk_lengths(first, source.frames)]

    def make(self, settings: QVGSettings, progress: Progress = silent) -> Made:
        source, lengths, steps = self.source, self.lengths, len(self.source.sigmas) - 1
        euler, stats, seconds = comfy.samplers.sampler_object("euler"), [], []

        def clock(segment: int) -> Clock:
            return Clock(steps, lambda done: progress(segment * steps + done, len(lengths) * steps))

        model = self.adapter.quantize(source.model, settings)
        if self.first is None:
            self.first = source.sample(model, euler, lengths[0], source.seed, clock(0))
        video = self.first
        for segment, new in enumerate(lengths[1:], 1):
            began = time.perf_counter()
            continued = self.adapter.continue_from(model, video[:, :, -GIVEN:])
            made = source.sample(continued, euler, new, (source.seed + segment) % 2**64, clock(segment))
            video = torch.cat([video, made], dim=2)
            stats.append(model.get_attachment(ATTACHMENT).history[-1])
            seconds.append(time.perf_counter() - began)
        return Made(source.in_network_scale(video), replace(stats[-1], peak_bytes=max(one.peak_bytes for one in stats)), seconds)
