"""Opening the checkpoint of an autoregressive video model as its authors published it.

Self-Forcing, Causal-Forcing, LongLive and Krea Realtime publish training checkpoints: a dict with a `generator_ema` or
a `generator` inside, keys wrapped by the trainer (`model.`, `_fsdp_wrapped_module.`), and nothing in the file that says
the network is causal. `open_checkpoint` unwraps such a file, and repackaged safetensors too, down to the key layout of
Wan 2.1 and says what it found. A file that cannot become a causal Wan is refused with a sentence that names what it is.

Causal and ordinary Wan 2.1 text-to-video files have the same keys and shapes, so no reader can tell them apart.

LongCat-Video is published in parts, of which any one may be named, and repackaged in one file; both come back in the layout of
`models.longcat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..files import tensor_files
from ..files.fields import short_repr
from . import longcat, wan
from .names import Found, find_network, split_layout

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = SAFETENSORS + PICKLED

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
MOST_PARTS = 1000
MOST_LAYERS = 256
BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,3})\..+")

# the weights that a network's sizes are read from, and how many axes they have
WAN_SIZING = {"patch_embedding.weight": 5, "text_embedding.0.weight": 2, "time_embedding.0.weight": 2, "blocks.0.ffn.0.weight": 2,
              "head.head.weight": 2}
LONGCAT_SIZING = {"time_embedding.mlp.0.weight": 2, "blocks.0.ffn.w1.weight": 2, "blocks.0.self_attn.norm_q.weight": 1}
# types of weights that are not packed
SINGLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

HEAD_DIM = 128
LATENT_CHANNELS = 16
DEFAULT_TEXT_DIM = 4096
SIZES = {
    (30, 1536): "1.3B, the size of Self-Forcing, Causal-Forcing and LongLive",
    (40, 5120): "14B, the size of Krea Realtime",
    (48, 4096): "13.6B",
}

# fragments of keys, and what a file with one of them is; the first match wins
LORA = "is a LoRA, not a model. Load the base model here and add the LoRA with LoraLoaderModelOnly"
NO_NETWORK = "which needs network code that ComfyUI's autoregressive sampler does not have"
STRANGERS = (
    (("lora_A", "lora_B", "lora_up", "lora_down", ".lora.", ".hada_w", ".lokr_w"), LORA),
    (("vace_blocks.",), "is a Wan VACE model, which is not autoregressive"),
    (("img_emb.", "k_img."), "is an image-to-video Wan (it has an image encoder, img_emb), which core's autoregressive "
     "model cannot hold. Use a text-to-video checkpoint; ARVideoI2V gives it a start image"),
    (("control_adapter.", "ref_conv.", "face_adapter.", "audio_proj.", "casual_audio_encoder.", "cam_encoder"),
     "is a Wan with extra inputs (camera, audio, pose or reference), which is not a causal text-to-video model"),
    (("condition_embedder.",), "holds a Wan in the diffusers layout. Use the original or ComfyUI's file of it"),
    (("double_blocks.", "double_stream_blocks."), f"is a HunyuanVideo model, {NO_NETWORK}"),
    (("pre_crs_attn_norm.",), "lacks parts of LongCat-Video; the file may be one part of several, or damaged. Put all parts "
     "into one folder under the names they were published with"),
    (("decoder.conv1.", "encoder.conv1.", "decoder.conv_in."),
     "is a VAE. Put it in models/vae and load it with VAELoader"),
    (("shared.weight", "token_embedding.weight", "text_model."),
     "is a text encoder. Put it in models/text_encoders and load it with CLIPLoader"),
)


@dataclass(frozen=True)
class Description:
    """What `open_checkpoint` found.

    file: name of the file. container: where in the file the state dict was, "" when the file is flat. left: tensors beside it, not taken.
    layers, dim, ffn_dim, text_dim, head_dim: sizes read from the weights. parameters: how many numbers. dtype: of the weights.
    config: the `transformer` part of the file's own metadata, where it has any. model: "wan" or "longcat".
    """

    file: str
    container: str
    layers: int
    dim: int
    ffn_dim: int
    text_dim: int
    parameters: int
    dtype: str
    config: dict = field(default_factory=dict)
    head_dim: int = HEAD_DIM
    model: str = "wan"
    left: int = 0

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def family(self) -> str:
        """One line for a person. The families of one size have the same keys, so only the size can be named."""
        size = SIZES.get((self.layers, self.dim), f"{self.parameters / 1e6:.0f} M parameters")
        if self.model == "longcat":
            return f"LongCat-Video, {self.layers} layers, {self.heads} heads ({size})"
        return f"causal Wan 2.1 layout, {self.layers} layers, {self.heads} heads ({size})"

    def __str__(self) -> str:
        taken = f", from {self.container!r}" if self.container else ""
        left = f"; {self.left} other tensors were not taken" if self.left else ""
        return f"{self.file}: {self.family}, {self.dtype}{taken}{left}"

    def metadata(self) -> dict[str, str]:
        """Safetensors metadata that makes ComfyUI build the causal network; nothing in the weights would."""
        transformer = {**self.config, "causal_ar": True}
        if self.text_dim != DEFAULT_TEXT_DIM:
            transformer["text_dim"] = self.text_dim
        return {"config": json.dumps({"transformer": transformer})}


def open_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], Description]:
    """State dict in the key layout of Wan 2.1 or of `models.longcat` (tensors on the CPU, mapped from the file) and what it is.

    Raises ValueError with a sentence for a file that is not, or cannot become, a causal Wan 2.1 or LongCat-Video.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} is not a checkpoint that can be read here; choose a {', '.join(SUFFIXES)} file.")
    if path.suffix.lower() in SAFETENSORS:
        content, config, available = _read_parts(path)
    else:
        content, config, available = tensor_files.read_pickled(path), {}, path.stat().st_size
    try:
        found = find_network(content)
        tensor_files.check(found.state, available)
        state = split_layout(found.state) if longcat.is_longcat(found.state) else found.state
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be opened. {error}") from error
    if "lora" in found.container:
        raise ValueError(f"{path.name} {LORA}.")
    return state, _describe(path.name, found, state, config)


def _read_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict, int]:
    """A file, or all parts of the model whose part it is; what their metadata says, and how many bytes they have."""
    numbered = PART.fullmatch(path.name)
    names = [path.name]
    if numbered is not None:
        stem, count, suffix = numbered["stem"], int(numbered["count"]), numbered["suffix"]
        if not 1 <= int(numbered["number"]) <= count <= MOST_PARTS:
            raise ValueError(f"{path.name} calls itself part {int(numbered['number'])} of {count}, which cannot be. Give the file the name "
                             "that it was published with.")
        names = [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()] if numbered else []
    if missing:
        raise ValueError(f"{path.name} is one part of {count}, and {', '.join(missing[:3])} is not beside it. Put all parts into one "
                         "folder under the names they were published with.")
    content, config, available = {}, {}, 0
    for name in names:
        part, metadata = tensor_files.read_safetensors(path.parent / name)
        content |= part
        config |= _config(name, metadata)
        available += (path.parent / name).stat().st_size
    return content, config, available


def _config(name: str, metadata: dict[str, str]) -> dict:
    """What a file's metadata says about its network besides the sizes, which only weights can say."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} has metadata that cannot be read ({tensor_files.first_line(error)}); download it again.") from None
    config = config.get("transformer") if isinstance(config, dict) else None
    eps = config.get("eps") if isinstance(config, dict) else None
    return {"eps": eps} if isinstance(eps, float) and 0 < eps < 1 else {}


def _describe(name: str, found: Found, state: dict[str, torch.Tensor], config: dict) -> Description:
    for fragments, sentence in STRANGERS:
        if any(fragment in key for key in state for fragment in fragments):
            raise ValueError(f"{name} {sentence}.")
    if longcat.is_longcat(state):
        _check_layers(name, state)
        try:
            sizes = longcat.LongCatSizes.read(state)
        except ValueError as error:
            raise ValueError(f"{name} cannot be opened. {error}") from error
        _check_weights(name, "LongCat-Video", state, lambda: longcat.LongCat(sizes))
        return Description(
            file=name, container=found.container, left=len(found.left), layers=sizes.layers, dim=sizes.dim, ffn_dim=sizes.ffn_dim,
            text_dim=sizes.text_dim, parameters=sum(t.numel() for t in state.values()), head_dim=sizes.head_dim, model="longcat",
            dtype=str(state["blocks.0.ffn.w3.weight"].dtype).removeprefix("torch."))

    if "patch_embedding.weight" not in state or "head.modulation" not in state:
        holds = ", ".join(sorted(state)[:3]) or "no tensors"
        raise ValueError(f"{name} is not a Wan 2.1 video model (it holds {holds}). Choose the file of Self-Forcing, "
                         "Causal-Forcing, LongLive, or another model with that layout.")
    dim, channels = _shape(name, state, "patch_embedding.weight", 5)[:2]
    if channels != LATENT_CHANNELS:
        kind = {36: "an image-to-video Wan", 48: "a Wan 2.2 5B"}.get(channels, "another Wan")
        raise ValueError(f"{name} is {kind}: it takes {channels} latent channels. ComfyUI's autoregressive model takes "
                         f"{LATENT_CHANNELS}; choose a causal checkpoint of Wan 2.1 text-to-video.")
    if dim % HEAD_DIM:
        raise ValueError(f"{name} has width {dim}; Wan heads have {HEAD_DIM} channels, which does not divide it.")
    _check_layers(name, state)
    if missing := [key for key in WAN_SIZING if key not in state]:
        raise ValueError(f"{name} looks like Wan 2.1 but lacks {', '.join(missing[:3])}; the file may be one part of several, or damaged.")
    sizes = wan.WanSizes.read(state)
    _check_weights(name, "Wan 2.1", state, lambda: wan.CausalWan(sizes))
    return Description(
        file=name, container=found.container, left=len(found.left), layers=sizes.layers, dim=dim, ffn_dim=sizes.ffn_dim,
        text_dim=sizes.text_dim, parameters=sum(t.numel() for t in state.values()),
        dtype=str(state["blocks.0.self_attn.q.weight"].dtype).removeprefix("torch."), config=config)


def _shape(name: str, state: dict[str, torch.Tensor], key: str, axes: int) -> torch.Size:
    """Of a weight that decides the network's sizes. Raises ValueError where it is empty or has another number of axes."""
    shape = state[key].shape
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} holds {key} with shape {short_repr(shape)}, where {axes} numbers above 0 belong; the file is damaged, "
                         "download it again.")
    return shape


def _check_layers(name: str, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where the network's layers cannot be counted: before it is built, since a file may say that there are billions."""
    for key, axes in {**WAN_SIZING, **LONGCAT_SIZING}.items():
        if key in state:
            _shape(name, state, key, axes)
    found = {key: BLOCK.fullmatch(key) for key in state if key.startswith("blocks.")}
    if strange := [key for key, match in found.items() if match is None]:
        raise ValueError(f"{name} holds {strange[0][:80]}, which is no part of a numbered layer; the file is damaged, download it again.")
    numbers = {int(match[1]) for match in found.values()}
    if numbers != set(range(len(numbers))) or len(numbers) > MOST_LAYERS:
        raise ValueError(f"{name} numbers {len(numbers)} layers from {min(numbers)} to {max(numbers)}; they should follow each other from "
                         f"0 to {MOST_LAYERS - 1} at most. The file may be one part of several, or damaged.")


def _check_weights(name: str, kind: str, state: dict[str, torch.Tensor], build: Callable[[], nn.Module]) -> None:
    """Raises ValueError where a network of the sizes that were read has weights that the file lacks, or has in another shape. What is
    missing would be filled with whatever is in memory, and one false size can ask for more memory than any file holds."""
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name} describes a {kind} that cannot be ({tensor_files.first_line(error)}); download it again.") from error
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{name} is {kind} but lacks {', '.join(missing[:3])}; the file may be one part of several, or damaged.")
    for key, weight in expected.items():
        shape, found = tuple(weight.shape), state[key]
        fits = tuple(found.shape) == shape and found.dtype in SINGLE
        if f"{key.removesuffix('weight')}comfy_quant" in state:
            # packed by ComfyUI's rules, of which only the least size is known here: a bit for each number
            fits = found.ndim == weight.ndim and 8 * found.nbytes >= weight.numel()
        if not fits:
            raise ValueError(f"{name} holds {key} as {str(found.dtype).removeprefix('torch.')} of shape {short_repr(found.shape)}, but the "
                             f"network that its other weights describe has {shape} there; the file is damaged, download it again.")
