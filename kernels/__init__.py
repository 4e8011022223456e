"""Triton kernels: one op a file, each with the meaning of its reference implementation in `qvg`, which stays the definition.

The only place that imports triton. `qvg.backends.dispatch` imports it on first use and keeps the reason where that fails.
"""
