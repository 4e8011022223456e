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
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .models import longcat
from .names import Found, find_network, split_layout

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = SAFETENSORS + PICKLED

PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

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
    (("lora_A", "lora_B", "lora_up", "lora_down", ".lora."), LORA),
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
        content, config = _read_parts(path)
    else:
        content, config = _read_pickled(path), {}
    try:
        found = find_network(content)
        state = split_layout(found.state) if longcat.is_longcat(found.state) else found.state
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be opened. {error}") from error
    if "lora" in found.container:
        raise ValueError(f"{path.name} {LORA}.")
    return state, _describe(path.name, found, state, config)


def _read_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A file, or all parts of the model whose part it is."""
    numbered = PART.fullmatch(path.name)
    if numbered is None:
        return _read_safetensors(path)
    stem, count, suffix = numbered["stem"], numbered["count"], numbered["suffix"]
    names = [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{path.name} is one part of {int(count)}, and {', '.join(missing[:3])} is not beside it. Put all parts into one "
                         "folder under the names they were published with.")
    content, config = {}, {}
    for name in names:
        part, found = _read_safetensors(path.parent / name)
        content |= part
        config |= found
    return content, config


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({error}); download it again.") from error
    return content, json.loads(metadata.get("config", "{}")).get("transformer", {})


def _read_pickled(path: Path) -> dict:
    # only the zip format, torch's own since 1.6, can be mapped; its index is at the end, which a broken download lacks
    whole_zip = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if file.read(2) == b"PK" and not whole_zip:
            raise ValueError(f"{path.name} is not a whole .pt file; download it again.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=whole_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} holds Python objects besides tensors, or is damaged. It is not opened, because "
                         "such a file can run code. Get a .safetensors file, or a .pt of plain tensors.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a state dict.")
    return content


def _describe(name: str, found: Found, state: dict[str, torch.Tensor], config: dict) -> Description:
    for fragments, sentence in STRANGERS:
        if any(fragment in key for key in state for fragment in fragments):
            raise ValueError(f"{name} {sentence}.")
    if longcat.is_longcat(state):
        try:
            sizes = longcat.LongCatSizes.read(state)
        except ValueError as error:
            raise ValueError(f"{name} cannot be opened. {error}") from error
        with torch.device("meta"):
            missing = sorted(longcat.LongCat(sizes).state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"{name} is LongCat-Video but lacks {', '.join(missing[:3])}; the file may be one part of several, or "
                             "damaged.")
        return Description(
            file=name, container=found.container, left=len(found.left), layers=sizes.layers, dim=sizes.dim, ffn_dim=sizes.ffn_dim,
            text_dim=sizes.text_dim,
            parameters=sum(t.numel() for t in state.values()), head_dim=sizes.head_dim, model="longcat",
            dtype=str(state["blocks.0.ffn.w3.weight"].dtype).removeprefix("torch."))

    patch = state.get("patch_embedding.weight")
    if patch is None or "head.modulation" not in state:
        holds = ", ".join(sorted(state)[:3]) or "no tensors"
        raise ValueError(f"{name} is not a Wan 2.1 video model (it holds {holds}). Choose the file of Self-Forcing, "
                         "Causal-Forcing, LongLive, or another model with that layout.")
    channels = patch.shape[1]
    if channels != LATENT_CHANNELS:
        kind = {36: "an image-to-video Wan", 48: "a Wan 2.2 5B"}.get(channels, "another Wan")
        raise ValueError(f"{name} is {kind}: it takes {channels} latent channels. ComfyUI's autoregressive model takes "
                         f"{LATENT_CHANNELS}; choose a causal checkpoint of Wan 2.1 text-to-video.")

    dim = patch.shape[0]
    if dim % HEAD_DIM:
        raise ValueError(f"{name} has width {dim}; Wan heads have {HEAD_DIM} channels, which does not divide it.")
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    layers = len(numbers)
    needed = ["text_embedding.0.weight", "time_embedding.0.weight", "time_projection.1.weight", "head.head.weight"]
    needed += [f"blocks.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q", "cross_attn.o", "ffn.2")]
    missing = [key for key in needed if key not in state]
    if missing or not layers:
        raise ValueError(f"{name} looks like Wan 2.1 but lacks {', '.join(missing[:3]) or 'its blocks'}; "
                         "the file may be one part of several, or damaged.")
    return Description(
        file=name, container=found.container, left=len(found.left), layers=layers, dim=dim,
        ffn_dim=state["blocks.0.ffn.0.weight"].shape[0], text_dim=state["text_embedding.0.weight"].shape[1],
        parameters=sum(t.numel() for t in state.values()),
        dtype=str(state["blocks.0.self_attn.q.weight"].dtype).removeprefix("torch."), config=config)
