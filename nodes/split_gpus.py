"""Split over GPUs (QVG): one video by several GPUs, of this machine or of a Ray cluster.

    QVGSplitOverGPUs  MODEL -> MODEL whose video is made on several GPUs, by the node that `SAMPLERS` names

Nothing is started here: the processes of the other GPUs begin with the first run (`ranks.crews`).
"""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..qvg.attention.ranks import Ranks
from ..qvg.models import HY_WORLDPLAY_5B, HY_WORLDPLAY_8B
from ..qvg.models.longcat import LONGCAT
from ..qvg.models.wan import WAN
from ..qvg.video.crew import load_ray
from .adapters.compiled import original
from .adapters.families import family_of
from .ranks.crews import CREWS, most_gpus
from .ranks.mark import Split, put
from .ranks.network import heads_of

# a family -> the node that makes its videos on several GPUs
WALK = "World Walk (HY-WorldPlay, QVG)"
SAMPLERS = {WAN.name: "AR Video Sampler (QVG)", LONGCAT.name: "Continue Video (LongCat, QVG)", HY_WORLDPLAY_5B.name: WALK,
            HY_WORLDPLAY_8B.name: WALK}


def gpus_for(wanted: int, heads: int, device) -> int:
    """How many GPUs of this machine make a video. wanted: 0 for as many as divide the heads.

    Raises ValueError for more than there are, and for a number that does not divide the heads.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"ComfyUI runs on {device.type} here, but a video is split over NVIDIA or AMD GPUs. Remove Split over GPUs (QVG).")
    visible = most_gpus()
    if device.type == "cpu":
        if not wanted:
            raise ValueError("ComfyUI runs on the CPU here, where no number of GPUs can be found. Set gpus to the number of processes that "
                             "shall make the video.")
    elif wanted > visible:
        raise ValueError(f"The video is to be split over {wanted} GPUs, but ComfyUI sees {visible}. Set gpus to 0 for all of them.")
    if not wanted:
        return max(count for count in range(1, max(1, visible) + 1) if heads % count == 0)
    Ranks(0, wanted).heads(heads)
    return wanted


class QVGSplitOverGPUs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGSplitOverGPUs", display_name="Split over GPUs (QVG)", category="QuantVideoGen",
            description="Makes one video on several GPUs: each computes a share of every frame and keeps the KV cache of a share of the "
                        "heads. Needs Ray: pip install ray.",
            search_aliases=["multi gpu", "multigpu", "several gpus", "ray", "raylight", "distributed", "ulysses", "qvg"],
            inputs=[
                io.Model.Input("model", tooltip="A causal video model (Self-Forcing, Causal-Forcing), LongCat-Video or HY-WorldPlay, with "
                                                "its LoRAs."),
                io.Int.Input("gpus", default=0, min=0, max=64,
                             tooltip="How many GPUs make the video; the number must divide the heads of the model (12 in a 1.3B). 0, the "
                                     "default, is as many of those that ComfyUI sees as divide them. With one GPU the node does nothing."),
                io.String.Input("cluster", default="", optional=True, advanced=True,
                                tooltip="Address of a Ray cluster that this machine belongs to, such as 192.168.1.10:6379. Empty, the "
                                        "default, is this machine alone, on which nothing then listens for others."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model for AR Video Sampler (QVG), Continue Video (LongCat, "
                                                                   "QVG) or World Walk (HY-WorldPlay, QVG).")])

    @classmethod
    def execute(cls, model, gpus, cluster="") -> io.NodeOutput:
        network, cluster = original(model.get_model_object("diffusion_model")), cluster.strip()
        family = family_of(network)
        if family is None or family.name not in SAMPLERS:
            title = type(network).__name__ if family is None else family.title
            raise ValueError(f"{title} cannot be split over GPUs. Load a Self-Forcing or Causal-Forcing checkpoint, LongCat-Video or "
                             "HY-WorldPlay with Load AR Video Model (QVG).")
        if not cluster:
            gpus = gpus_for(gpus, heads_of(network), model.load_device)
        elif gpus:
            Ranks(0, gpus).heads(heads_of(network))
        if gpus == 1:
            logging.info("QVG: the video is made on one GPU, which is the only one or was asked for")
            return io.NodeOutput(model)
        load_ray()
        patched, split = model.clone(), Split(gpus, cluster, SAMPLERS[family.name])
        CREWS.register(split)
        put(patched, split, CREWS.unloaded)
        return io.NodeOutput(patched)
