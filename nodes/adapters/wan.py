"""The adapter for core's causal Wan: Self-Forcing, Causal-Forcing, LongLive and their like.

The hooks (`wan_hook`, and `wan_plain` for the preset Off) are object patches and wrappers on a clone, so the model is unchanged in every
graph that does not use the node. A SAMPLER of this pack brings caches of its own (`causal`).
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP

from ...qvg.models.wan import WanSizes, causal_metadata
from ...qvg.settings import QVGSettings
from ..run_log import ATTACHMENT, RunLog
from .compiled import original
from .patches import check_taken
from .wan_core import ATTENTION_PATCH, KEY, PATCHES
from .wan_hook import Hook
from .wan_plain import PlainHook


def _patched(layers: int) -> list[str]:
    return [*PATCHES, *map(ATTENTION_PATCH.format, range(layers))]


def _uninstall(patched, layers: int) -> None:
    """Remove an earlier hook, so that of two nodes in a row the last one counts."""
    for name in _patched(layers):
        patched.object_patches.pop(name, None)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.PREDICT_NOISE):
        patched.remove_wrappers_with_key(kind, KEY)


def load(state: dict[str, torch.Tensor], *, config: Mapping, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """A ModelPatcher of core's causal Wan; see `families.Adapter`."""
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype} if dtype else {}, disable_dynamic=disable_dynamic,
                                                    metadata=causal_metadata(WanSizes.read(state), config))


def owns(network: torch.nn.Module) -> bool:
    """Whether this is core's causal Wan, or a network with its interface."""
    return hasattr(network, "init_kv_caches")


def quantize(model, settings: QVGSettings, node_id: str | None = None):
    """A clone of `model` whose cache is quantized according to `settings`; with the preset Off, core's own cache is only measured.

    node_id: the node that shows the run's bytes.
    Raises ValueError when the settings do not fit the heads, or another node's patch is in the way.
    """
    network = original(model.get_model_object("diffusion_model"))
    for tensor in (settings.key, settings.value):
        tensor.groups(network.head_dim)
    patched = model.clone()
    log = RunLog(settings, node_id)
    patched.set_attachments(ATTACHMENT, log)
    if model.get_attachment(ATTACHMENT) is not None:
        _uninstall(patched, network.num_layers)
    check_taken(patched, _patched(network.num_layers))
    hook = PlainHook(model.model, log) if settings.changes_nothing else Hook(model.model, settings, log)
    hook.install(patched)
    return patched
