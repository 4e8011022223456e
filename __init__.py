"""ComfyUI-QuantVideoGen: long autoregressive video with a KV cache of one or two bits per element."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # imported here so that the package, and `qvg` inside it, also loads where there is no ComfyUI
    from .nodes import QuantVideoGenExtension

    return QuantVideoGenExtension()
