"""Refuses, before the first step, graphs that core's autoregressive sampler cannot run.

Without these checks such graphs fail inside the sampler, after the model was loaded, with a message about tensor shapes.
"""

from __future__ import annotations

ONE_CONDITION = "but the autoregressive sampler keeps one cache for one condition."


def is_autoregressive(sampler) -> bool:
    """Whether this is core's Sampler AR Video."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "") == "sample_ar_video"


def evaluated(guider) -> list[dict]:
    """The conditions that the guider evaluates; at cfg 1 core skips the negative ones."""
    skips = getattr(guider, "cfg", None) == 1.0 and not guider.model_options.get("disable_cfg1_optimization")
    return [cond for name, conds in guider.conds.items() if not (skips and name == "negative") for cond in conds]


def check_size(shape) -> None:
    """Raises ValueError for latents [B, C, F, H, W] that do not divide into the model's patches of 2 x 2."""
    rows, columns = shape[3:]
    if rows % 2 or columns % 2:
        # Wan's latents are an eighth of the picture
        raise ValueError(f"The latent is of {8 * columns} x {8 * rows} pixels, but the model divides pictures into tokens of 16 x 16. "
                         f"Set width and height to multiples of 16, such as {16 * max(1, columns // 2)} x {16 * max(1, rows // 2)}.")


def check_run(guider, noise, sampler, sigmas, denoise_mask) -> None:
    """Raises ValueError when a sampling run (arguments of `CFGGuider.outer_sample`) cannot use a KV cache."""
    if getattr(sampler, "keeps_own_caches", False):
        return
    _check_sampler(sampler, sigmas)
    if noise.ndim != 5:
        raise ValueError(f"The latent has {noise.ndim} axes; a video latent has 5. Connect Empty AR Video Latent.")
    check_size(noise.shape)
    if denoise_mask is not None:
        raise ValueError("The latent has a noise mask, which the autoregressive sampler does not support. Remove Set Latent Noise Mask.")
    _check_conditions(guider)
    start = guider.model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
    if start is not None:
        _check_start(start.shape, noise.shape)


def _check_sampler(sampler, sigmas) -> None:
    function = getattr(sampler, "sampler_function", None)
    # a sampler of another pack may be autoregressive; of core's samplers, only one is
    if function is not None and function.__module__.startswith("comfy.") and not is_autoregressive(sampler):
        raise ValueError(f"The sampler {function.__name__.removeprefix('sample_')} makes the whole video at once and keeps no KV "
                         "cache. Connect Sampler AR Video, or take the MODEL from before Quantize KV Cache (QVG).")
    if len(sigmas) and sigmas[-1] != 0:
        raise ValueError(f"The last sigma is {float(sigmas[-1]):g}, but the autoregressive sampler finishes each block before the "
                         "next. Use sigmas that end in 0.")


def _check_start(start, noise) -> None:
    if start[0] != noise[0]:
        raise ValueError(f"The latent holds {noise[0]} videos, but the start image is one. Set batch_size of AR Video I2V to 1.")
    if start[3:] != noise[3:]:
        # Wan's latents are an eighth of the picture
        (rows, columns), (other_rows, other_columns) = start[3:], noise[3:]
        raise ValueError(f"The start image is {8 * columns} x {8 * rows} pixels, but the latent is for {8 * other_columns} x "
                         f"{8 * other_rows}. Connect the LATENT of AR Video I2V to the sampler, or give both the same size.")


def _check_conditions(guider) -> None:
    cfg = getattr(guider, "cfg", 1.0)
    if cfg != 1.0:
        raise ValueError(f"cfg is {cfg:g}, {ONE_CONDITION} Set cfg to 1.")
    count = len(guider.conds.get("positive", ()))
    if count > 1:
        raise ValueError(f"{count} conditions are combined, {ONE_CONDITION} Connect a single prompt.")
    more = sorted(set(guider.conds) - {"positive", "negative"})
    if more:
        raise ValueError(f"{type(guider).__name__} also evaluates {', '.join(more)}, {ONE_CONDITION} Use Basic Guider.")
    if "negative" in guider.conds and guider.model_options.get("disable_cfg1_optimization"):
        raise ValueError(f"A node on this model asks for the negative prompt even at cfg 1, {ONE_CONDITION} "
                         "Remove that node, or use Basic Guider.")
