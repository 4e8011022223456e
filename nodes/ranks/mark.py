"""What Split over GPUs (QVG) puts on a MODEL. Samplers of this pack look for it; runs of others are refused."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.patcher_extension import CallbacksMP, WrappersMP

KEY = "quantvideogen_split"


@dataclass(eq=False)
class Split:
    """gpus: how many, 0 for all of a cluster. cluster: its address, "" for this machine alone. sampler: the node that makes the video."""

    gpus: int
    cluster: str = ""
    sampler: str = "AR Video Sampler (QVG)"

    @property
    def shares(self) -> int:
        """How many parts the heads are divided into, as far as that is known."""
        return max(1, self.gpus)


def split_of(patcher) -> Split | None:
    """The mark of a MODEL, None for one that samples on one GPU."""
    return patcher.get_attachment(KEY)


def put(patched, split: Split, unloaded) -> None:
    """Mark a clone. unloaded: called when ComfyUI unloads the model."""
    patched.set_attachments(KEY, split)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    patched.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, unloaded)


def _outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
    if not getattr(sampler, "splits_over_gpus", False):
        split = split_of(executor.class_obj.model_patcher)
        raise ValueError("The model is split over GPUs, but this sampler asks one GPU for the whole video. Connect "
                         f"{split.sampler}, or take the MODEL from before Split over GPUs (QVG).")
    return executor(noise, latent_image, sampler, *args, **kwargs)
