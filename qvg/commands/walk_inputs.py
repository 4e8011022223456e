"""What a walk of `qvg generate` begins with, from its --embeddings file: safetensors with

    positive    [N, L, C]: a text embedding for each of N prompts, or [L, C] for one
    start       [1, c, 1, h, w]: latents of the start image in the scale of the VAE, as VAE Encode in ComfyUI gives them
    negative    [1, L, C], for guidance

and for the 8B, where they exist, byT5's tokens of the words in quotation marks, masks that are 0 where there is padding, and SigLIP's
tokens of the start image:

    positive_byt5 [N, M, B], positive_mask [N, L], positive_byt5_mask [N, M], the same of `negative` with N = 1, and vision [1, V, S]

C is 4096 for the 5B (umt5-xxl) and 3584 for the 8B (Qwen2.5-VL), B is 1472, S is 1152; c is 48 and 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_safetensors, short_repr
from ..measure.inputs import NEGATIVE, POSITIVE, read_embeddings
from ..models import HY_WORLDPLAY_8B, Family, Sizes
from ..video.walk_job import START, WalkInputs, WalkText

VISION = "vision"
# the lengths of an axis that have no number
ANY = "prompts", "tokens", "height", "width"
HELP = ("for HY-WorldPlay also 'start' [1, channels, 1, height, width], latents of the start image as VAE Encode in ComfyUI gives them, "
        "and for its 8B, where there are any, 'positive_byt5' [prompts, tokens, 1472], 'vision' [1, tokens, 1152] of SigLIP, the masks "
        "'positive_mask' and 'positive_byt5_mask' [prompts, tokens], and the same of 'negative'")


def read_walk(path: Path, family: Family, sizes: Sizes) -> WalkInputs:
    """The inputs of a file, as the module's docstring says. Raises ValueError for a file that does not hold them."""
    texts = read_embeddings(path, sizes.text_dim)
    content, _ = read_safetensors(path)
    asked = _asked(family, sizes, len(texts.positive))
    unknown = sorted(content.keys() - asked.keys())
    if unknown:
        raise ValueError(f"{path.name} holds {unknown[0]!r}, but {family.title} takes {', '.join(asked)}. Save it without, or under one of "
                         "these names.")
    if START not in content:
        raise ValueError(f"{path.name} has no tensor {START!r}, with which a walk begins. Save the latents of the start image under that "
                         f"name, as {_written(asked[START])}.")
    others = {name: tensor for name, tensor in content.items() if name not in (POSITIVE, NEGATIVE)}
    found = {name: _checked(path, name, tensor, asked[name], family) for name, tensor in others.items()}
    _check_masks(path, found | {POSITIVE: torch.cat(texts.positive)} | ({} if texts.negative is None else {NEGATIVE: texts.negative}))
    return WalkInputs(
        start=found[START].float(), texts=tuple(_text(found, POSITIVE, one, number) for number, one in enumerate(texts.positive)),
        negative=None if texts.negative is None else _text(found, NEGATIVE, texts.negative, 0), vision=found.get(VISION))


def _asked(family: Family, sizes: Sizes, prompts: int) -> dict[str, Sequence[int | str]]:
    """The tensors that may be there, and their shapes."""
    asked = {POSITIVE: (prompts, "tokens", sizes.text_dim), NEGATIVE: (1, "tokens", sizes.text_dim),
             START: (1, sizes.channels, 1, "height", "width")}
    if family is not HY_WORLDPLAY_8B:
        return asked
    for name, count in ((POSITIVE, prompts), (NEGATIVE, 1)):
        asked |= {f"{name}_mask": (count, "tokens"), f"{name}_byt5": (count, "tokens", sizes.glyph_dim),
                  f"{name}_byt5_mask": (count, "tokens")}
    return asked | {VISION: (1, "tokens", sizes.image_dim)}


def _written(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _checked(path: Path, name: str, tensor: Tensor, shape: Sequence[int | str], family: Family) -> Tensor:
    fits = tensor.ndim == len(shape) and all(axis in (length, *ANY) for length, axis in zip(tensor.shape, shape))
    if not fits or not tensor.numel() or not (tensor.is_floating_point() or name.endswith("_mask")):
        raise ValueError(f"{path.name} holds {name!r} as {str(tensor.dtype).removeprefix('torch.')} of shape "
                         f"{short_repr(list(tensor.shape))}, but {family.title} takes it as {_written(shape)}.")
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{path.name} holds values in {name!r} that are not finite. Encode it again, in float32 or bfloat16.")
    return tensor


def _check_masks(path: Path, found: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a mask that is not of its tokens."""
    for name in (name for name in found if name.endswith("_mask")):
        mask, tokens = found[name], found.get(name.removesuffix("_mask"))
        if tokens is None or mask.shape != tokens.shape[:2]:
            held = "has none" if tokens is None else f"holds {short_repr(list(tokens.shape[:2]))} of them"
            raise ValueError(f"{path.name} holds {name!r} of shape {short_repr(list(mask.shape))}, a mask of tokens in "
                             f"{name.removesuffix('_mask')!r}, but {held}. Save both with the same prompts and tokens.")
        if "byt5" not in name and not bool(mask.bool().any(1).all()):
            raise ValueError(f"{path.name} holds a prompt in {name!r} whose tokens are all padding. Encode it again.")


def _text(found: Mapping[str, Tensor], name: str, tokens: Tensor, number: int) -> WalkText:
    mask, glyphs, glyph_mask = (found[key][number:number + 1] if key in found else None
                                for key in (f"{name}_mask", f"{name}_byt5", f"{name}_byt5_mask"))
    if glyph_mask is not None and not glyph_mask.any():
        # a prompt without words in quotation marks, beside others that have some
        glyphs = glyph_mask = None
    return WalkText(tokens, mask, glyphs, glyph_mask)
