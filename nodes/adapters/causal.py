"""Core's causal Wan as a `Model` of `qvg.video`: each condition of the guider has its own KV cache and cross-attention cache.

During a run, the network's forward and its self-attention are replaced on the instance, and restored in `finally`. So this works with any
guider, loader and LoRA, with or without Quantize KV Cache (QVG) on the model. A batch of several conditions is split by the ids that core
assigns to them, and each part goes through core's own `forward_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import torch

from ...qvg.attention.cached import CachedAttention
from ...qvg.cache.kv_cache import KVCache, shrink
from ...qvg.cache.stats import CacheStats
from .attention import attention_to
from .checks import evaluated
from .compiled import eager, eager_shell, original
from .patches import check_pass
from .wan_core import compute_dtype

# in a CONDITIONING entry: [(first latent frame, embedding [1, L, C], name), ...]
SCHEDULE = "qvg_schedule"


@dataclass
class Slot:
    """The caches of one condition. cross: core's cross-attention caches, created again for every prompt."""

    cache: KVCache
    schedule: list
    cross: list | None = None
    cross_name: str | None = None

    def entry(self, frame: int) -> tuple:
        """(first frame, embedding or None for the condition's own, name) of the prompt at a latent frame."""
        return next((entry for entry in reversed(self.schedule) if entry[0] <= frame), (0, None, ""))


class Handle:
    """What core's block passes to its self-attention as the layer's cache."""

    def __init__(self, attend: CachedAttention, layer: int):
        self.attend, self.layer = attend, layer


class CausalWan:
    """The model, its guider, and the caches; see `qvg.video.Model` for the methods.

    guider: a CFGGuider of core, or a compatible one, during a run. make_cache: called once per condition.
    """

    def __init__(self, guider, extra_args: dict, make_cache: Callable[[], KVCache], position_limit: int):
        self.guider, self.extra_args, self.position_limit = guider, extra_args, position_limit
        self.network = original(guider.inner_model.diffusion_model)
        self.slots = {cond["uuid"]: Slot(make_cache(), cond.get(SCHEDULE) or []) for cond in evaluated(guider)}
        self.caches = [slot.cache for slot in self.slots.values()]
        for cache in self.caches:
            cache.said = self.caches[0].said  # each warning is given once a run
        self._now = (0, 0, False)
        self._forwards, self._before = [], {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The network uses these caches inside the block and is restored afterwards, also after an error."""
        layers = [original(block).self_attn for block in self.network.blocks]
        self._forwards = [(self.network, eager_shell(self._forward)), *((layer, self._self_attention(layer)) for layer in layers)]
        try:
            yield
        finally:
            for module, forward in self._forwards:
                if vars(module).get("forward") is forward:
                    del module.forward
                    if (before := self._before[module]) is not None:
                        module.forward = before
            for cache in self.caches:
                cache.free()

    def _install(self) -> None:
        # in every pass, because core applies its patches again when it moves the network between two passes
        for module, forward in self._forwards:
            if (now := vars(module).get("forward")) is not forward:
                self._before[module], module.forward = now, forward

    # the methods of `Model`

    def denoise(self, x: torch.Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> torch.Tensor:
        if not store:
            # a finished chunk is still stored, so that it can be saved
            comfy.model_management.throw_exception_if_processing_interrupted()
        self._now = first, prompt_frame, store
        self._install()
        return self.guider(x, x.new_full([x.shape[0]], sigma), **self.extra_args)

    def prompt(self, frame: int) -> str:
        return "\n".join(slot.entry(frame)[2] for slot in self.slots.values())

    def rewind(self, first: int) -> None:
        for cache in self.caches:
            cache.rewind(first)

    def shrink(self) -> str | None:
        comfy.model_management.soft_empty_cache()
        return shrink(self.caches)

    def stats(self) -> CacheStats:
        return CacheStats.total([cache.stats() for cache in self.caches])

    # what replaces the network's methods

    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # noqa: B006
        uuids = transformer_options["uuids"]
        rows = x.shape[0] // len(uuids)
        outs = []
        for number, uuid in enumerate(uuids):
            if uuid not in self.slots:
                raise ValueError("A condition was added after the run began. Connect the prompts to the guider only.")
            part = slice(number * rows, (number + 1) * rows)
            if self._stored(self.slots[uuid]):
                outs.append(torch.zeros_like(x[part]))
                continue
            outs.append(self._pass(self.slots[uuid], x[part], timestep[part], context[part], clip_fea, transformer_options))
        return torch.cat(outs)

    def _stored(self, slot: Slot) -> bool:
        """Whether the chunk of a storing pass is already stored: guidance that evaluates the network twice does so in this pass, too, where
        the result is not used."""
        first, _, store = self._now
        return store and slot.cache.frames > first

    @eager_shell
    def _pass(self, slot: Slot, x, timestep, context, clip_fea, transformer_options):
        context, first, handles = self._begin(slot, x, context, transformer_options)
        return type(self.network).forward_block(
            self.network, x, timestep.reshape(-1, 1).expand(-1, x.shape[2]), context, first, handles, slot.cross, clip_fea)

    @eager
    def _begin(self, slot: Slot, x, context, transformer_options: dict) -> tuple[torch.Tensor, int, list[Handle]]:
        """The current prompt's embedding, the first frame, and the handles through which the layers attend."""
        check_pass(transformer_options)
        first, at, store = self._now
        _, embedding, name = slot.entry(at)
        if embedding is not None:
            context = embedding.to(context).expand(x.shape[0], -1, -1)
        if slot.cross is None or slot.cross_name != name:
            slot.cross, slot.cross_name = self.network.init_crossattn_caches(x.shape[0], x.device, x.dtype), name
        attend = CachedAttention(slot.cache, start_frame=first, frames=x.shape[2], store=store, position_limit=self.position_limit,
                                 attention=attention_to(transformer_options, slot.cache))
        return context, first, [Handle(attend, layer) for layer in range(len(self.network.blocks))]

    @staticmethod
    def _self_attention(module):
        @eager
        def forward(x, freqs, kv_cache=None, transformer_options={}):  # noqa: B006 (core's signature)
            if not isinstance(kv_cache, Handle):
                return type(module).forward(module, x, freqs, kv_cache, transformer_options)
            shape = *x.shape[:2], module.num_heads, module.head_dim
            q, k, v = module.norm_q(module.q(x)).view(shape), module.norm_k(module.k(x)).view(shape), module.v(x).view(shape)
            return module.o(kv_cache.attend(kv_cache.layer, q, k, v).flatten(2))

        return forward


def cache_shape(base, shape) -> dict:
    """Arguments of `KVCache` for latents of `shape` (B, C, F, H, W) through a BaseModel."""
    network = base.diffusion_model
    return {"layers": network.num_layers, "heads": network.num_heads, "head_dim": network.head_dim, "batch": shape[0],
            "grid": (-(-shape[3] // 2), -(-shape[4] // 2)), "dtype": compute_dtype(base)}
