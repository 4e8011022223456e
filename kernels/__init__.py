"""Triton kernels, one op a file. Each computes what its reference implementation in `qvg` defines.

Only this folder imports triton. `qvg.backends` imports `ops` when an op first meets a GPU, and keeps the reason where that fails.
"""
