"""Hooks that make a model family in ComfyUI read a quantized KV cache, one module a family (`families`), and LoRA loading for all."""

from . import lora as lora
