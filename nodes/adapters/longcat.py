"""The adapter for LongCat-Video: its ComfyUI model (`longcat_model`) and sampling runs that continue given frames (`longcat_given`).

Any ComfyUI sampler makes the new frames. The MODEL that `continue_from` returns first passes the given frames through the network, once
per run, and stores each layer's keys and values.
"""

from __future__ import annotations

import torch

from ...qvg.cache.kv_cache import KVCache
from ...qvg.models.longcat import LONGCAT, LongCat
from ...qvg.settings import QVGSettings
from ..run_log import ATTACHMENT, RunLog
from .compiled import original
from .longcat_given import Hook
from .longcat_model import load as load


def owns(network: torch.nn.Module) -> bool:
    """Whether a MODEL's network is LongCat-Video, loaded by this pack."""
    return isinstance(network, LongCat)


def quantize(model, settings: QVGSettings, node_id: str | None = None):
    """A clone of `model` that stores given frames according to `settings`. node_id: the node that shows the run's bytes.

    Raises ValueError when the settings do not fit the heads.
    """
    for tensor in (settings.key, settings.value):
        tensor.groups(model.get_model_object("diffusion_model").sizes.head_dim)
    patched = model.clone()
    patched.set_attachments(ATTACHMENT, RunLog(settings, node_id))
    return patched


def check(model) -> None:
    """Raises ValueError when the model is not LongCat-Video."""
    if not owns(original(model.get_model_object("diffusion_model"))):
        raise ValueError(f"{type(model.get_model_object('diffusion_model')).__name__} cannot continue a video this way. Load LongCat-Video "
                         "with Load AR Video Model (QVG).")


def settings_of(model) -> QVGSettings:
    """The settings that `quantize` attached; unquantized if it was not used."""
    log: RunLog | None = model.get_attachment(ATTACHMENT)
    return QVGSettings.preset("off") if log is None else log.settings


def log_of(model) -> RunLog:
    """Where a run of this model is recorded."""
    return model.get_attachment(ATTACHMENT) or RunLog(settings_of(model), None)


def note_nothing(model) -> None:
    """Record a run of this model that continues nothing and has no cache."""
    log: RunLog | None = model.get_attachment(ATTACHMENT)
    if log is not None:
        log.start(0, None)
        log.note(KVCache(QVGSettings.preset("off"), layers=1, heads=1, head_dim=8, grid=(1, 1), rope=LONGCAT.rope).stats())
        log.end()


def continue_from(model, latents: torch.Tensor):
    """A clone of LongCat-Video whose sampling runs continue `latents` [B or 1, C, F, H, W], stored with the settings of `settings_of`."""
    patched = model.clone()
    Hook(latents, settings_of(model), log_of(model)).install(patched)
    return patched
