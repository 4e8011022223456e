"""Quant VideoGen's ideas in plain torch: a KV cache in about two bits per element.

Nothing here imports ComfyUI or triton. Read in the order that data passes through: `settings`, `smoothing`, `planes`,
`codec`, `cache`, `rope`, `attention`, `budget`.
"""
