"""Everything that imports ComfyUI: node schemas with a thin execute, and the hooks into model families (`adapters`)."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .kv_cache import QVGQuantizeKVCache, QVGSettingsNode
from .loader import QVGLoadARVideoModel
from .monitor import QVGMemoryMonitor
from .tiny_prompt import QVGDemoPrompt


class QuantVideoGenExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [QVGSettingsNode, QVGQuantizeKVCache, QVGLoadARVideoModel, QVGMemoryMonitor, QVGDemoPrompt]
