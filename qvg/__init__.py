"""Quant VideoGen's ideas in plain torch: a KV cache in about two bits a number.

Nothing here imports ComfyUI or triton. Read in the order that data passes through: `settings`, `smoothing`, `planes`,
`codec`, `cache`, `rope`, `attention`, `budget`.
"""
