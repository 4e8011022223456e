"""Files that are not a model of any registered family, recognized by fragments of their keys, and what to do with each."""

from __future__ import annotations

from collections.abc import Collection

from .family import FAMILIES, Family

LORA = "is a LoRA, not a model. Load the base model here and add the LoRA with LoraLoaderModelOnly"
NO_NETWORK = "which needs network code that ComfyUI's autoregressive sampler does not have"
# (fragments of keys, what a file with one of them is); the first match wins
OTHER_MODELS = (
    (("lora_A", "lora_B", "lora_up", "lora_down", ".lora.", ".hada_w", ".lokr_w"), LORA),
    (("vace_blocks.",), "is a Wan VACE model, which is not autoregressive"),
    (("img_emb.", "k_img."), "is an image-to-video Wan (it has an image encoder, img_emb), which core's autoregressive "
     "model cannot hold. Use a text-to-video checkpoint; ARVideoI2V gives it a start image"),
    (("control_adapter.", "ref_conv.", "face_adapter.", "audio_proj.", "casual_audio_encoder.", "cam_encoder"),
     "is a Wan with extra inputs (camera, audio, pose or reference), which is not a causal text-to-video model"),
    (("condition_embedder.",), "holds a Wan in the diffusers layout, without the actions of HY-WorldPlay. Use the original or ComfyUI's "
     "file of a Wan, and wan_distilled_model/model.pt of HY-WorldPlay 5B"),
    (("double_blocks.", "double_stream_blocks."), f"is a HunyuanVideo model without the actions and cameras of HY-WorldPlay, {NO_NETWORK}"),
    (("decoder.conv1.", "encoder.conv1.", "decoder.conv_in."),
     "is a VAE. Put it in models/vae and load it with VAELoader"),
    (("shared.weight", "token_embedding.weight", "text_model."),
     "is a text encoder. Put it in models/text_encoders and load it with CLIPLoader"),
)


def refuse_other_models(name: str, keys: Collection[str], family: Family | None) -> None:
    """Raises ValueError where keys of a file, recognized as `family` or not at all, say that it is something else."""
    def found(fragments: Collection[str]) -> bool:
        return any(fragment in key for key in keys for fragment in fragments)

    for fragments, sentence in OTHER_MODELS:
        if found([fragment for fragment in fragments if family is None or fragment not in family.own]):
            raise ValueError(f"{name} {sentence}.")
    for other in FAMILIES.values() if family is None else ():
        if found(other.fragments):
            raise ValueError(f"{name} lacks parts of {other.title}; the file may be one part of several, or damaged. Put all parts "
                             "into one folder under the names they were published with.")


def unknown_file(name: str, keys: Collection[str]) -> str:
    """A sentence about a file of which nothing is known."""
    families = [f"{family.title}{f' ({family.examples})' if family.examples else ''}"
                for family in FAMILIES.values() if family.recognizes is not None]
    return (f"{name} is not a video model of a known family (it holds {', '.join(sorted(keys)[:3]) or 'no tensors'}). Choose a checkpoint "
            f"of {', '.join(families)}, in its original layout.")
