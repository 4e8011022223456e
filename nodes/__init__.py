"""Everything that imports ComfyUI: node schemas with a thin execute, and the hooks into model families (`adapters`)."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..qvg.demo import NETWORK_PATH, VAE_PATH
from ..qvg.demo.world import WORLD_NETWORK_PATH, WORLD_VAE_PATH
from . import kv_cache, live
from .camera_path import QVGCameraPath
from .compare import QVGCompare
from .empty_latent import QVGEmptyLongVideoLatent
from .kv_cache import QVGQuantizeKVCache, QVGSettingsNode
from .loader import QVGLoadARVideoModel
from .long_video import QVGARVideoSampler
from .longcat import QVGLongCatContinue
from .measure import QVGMeasurePresets
from .monitor import QVGMemoryMonitor
from .plan import QVGPlanMemory
from .prompts import QVGPromptAt, QVGPromptSchedule
from .session import QVGLoadVideoSession, QVGSaveVideoSession
from .split_gpus import QVGSplitOverGPUs
from .stream import QVGStreamVideo
from .tiny_prompt import QVGDemoPrompt
from .tiny_room import QVGTinyRoom
from .world_walk import QVGWorldWalk


def list_tiny_model() -> None:
    """Let core's own loaders list the tiny models where they lie, so that nothing is copied into a person's models."""
    for path in (NETWORK_PATH, VAE_PATH, WORLD_NETWORK_PATH, WORLD_VAE_PATH):
        if path.is_file():
            folder_paths.add_model_folder_path(path.parent.name, str(path.parent))


class QuantVideoGenExtension(ComfyExtension):
    async def on_load(self) -> None:
        list_tiny_model()
        live.add_route()
        kv_cache.add_route()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [QVGSettingsNode, QVGQuantizeKVCache, QVGLoadARVideoModel, QVGLongCatContinue, QVGMemoryMonitor, QVGPlanMemory, QVGCompare,
                QVGDemoPrompt, QVGARVideoSampler, QVGEmptyLongVideoLatent, QVGPromptSchedule, QVGPromptAt, QVGSaveVideoSession,
                QVGLoadVideoSession, QVGStreamVideo, QVGMeasurePresets, QVGCameraPath, QVGWorldWalk, QVGTinyRoom, QVGSplitOverGPUs]
