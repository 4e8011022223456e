"""What the adapters of both HY-WorldPlay variants share (`worldplay_5b`, `worldplay_8b`): their passes, and Quantize KV Cache (QVG).

A walk calls the network through core (`worldplay_scene`), with a `Pass` in transformer_options that says which latent frames it sees, what
attends, and whether they are finished. There is no other way to call it: without cameras it would not know where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...qvg.settings import QVGSettings
from ..run_log import ATTACHMENT, RunLog
from .attention import attention_of, core_attention
from .compiled import EagerCall, eager, eager_shell, original
from .own_model import forward_in_wrappers
from .patches import OVERRIDE, check_pass

# in transformer_options: the `Pass`
PASS = "quantvideogen_walk"


class Prompt:
    """A condition's text as the network projects it, in the first pass of a run."""

    def __init__(self):
        self._projected = None

    def __call__(self, project: Callable):
        if self._projected is None:
            self._projected = project()
        return self._projected


@dataclass(frozen=True)
class Pass:
    """One pass over latent frames `frames` of a walk. timestep, action: [B, F]. attend: a `WorldAttention`. finished: only keys and values
    are wanted. image: latents of the start image, for a network that takes it as a condition."""

    frames: Sequence[int]
    timestep: Tensor
    action: Tensor
    attend: Callable
    prompt: Prompt
    finished: bool = False
    image: Tensor | None = None


class Walking:
    """ComfyUI's interface of a world model's network. A subclass has `_walk(x, walk, attend, attention, context, **kwargs)`, which returns
    the flow, or None for finished frames."""

    @eager_shell
    def forward(self, x, timestep, context=None, transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        return forward_in_wrappers(self, x, timestep, context, transformer_options, **kwargs)

    @eager_shell
    def _forward(self, x, timestep, context=None, transformer_options={}, **kwargs):  # noqa: B006
        walk, attend, attention = self._pass(transformer_options)
        flow = self._walk(x, walk, attend, attention, context, **kwargs)
        return torch.zeros_like(x) if flow is None else flow

    @eager
    def _pass(self, transformer_options: dict):
        """The pass, self-attention with cameras, and attention to the text."""
        walk: Pass | None = transformer_options.get(PASS)
        if walk is None:
            raise ValueError("HY-WorldPlay makes video along a camera path, which this sampler does not know. Connect the MODEL to World "
                             "Walk (HY-WorldPlay, QVG).")
        check_pass(transformer_options)
        attention = attention_of(transformer_options)
        # without an override compiled code needs no options
        return walk, EagerCall(walk.attend), EagerCall(attention) if OVERRIDE in transformer_options else core_attention


def quantize(model, settings: QVGSettings, node_id: str | None = None):
    """A clone of `model` whose walks keep keys and values according to `settings`. node_id: the node that shows the run's bytes.

    Raises ValueError when the settings do not fit the heads.
    """
    for tensor in (settings.key, settings.value):
        tensor.groups(original(model.get_model_object("diffusion_model")).sizes.head_dim)
    patched = model.clone()
    patched.set_attachments(ATTACHMENT, RunLog(settings, node_id))
    return patched


def settings_of(model) -> QVGSettings:
    """The settings that `quantize` attached; unquantized if it was not used."""
    log: RunLog | None = model.get_attachment(ATTACHMENT)
    return QVGSettings.preset("off") if log is None else log.settings


def check(model) -> None:
    """Raises ValueError when the model is not HY-WorldPlay."""
    network = original(model.get_model_object("diffusion_model"))
    if not isinstance(network, Walking):
        raise ValueError(f"{type(network).__name__} does not follow a camera path. Load HY-WorldPlay with Load AR Video Model (QVG).")
