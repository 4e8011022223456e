"""Packages of other projects, if installed, for measurements on the same tensors.

They come from PyPI as wheels and are installed with --no-deps, because quant-videogen pins a torch version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor


def _import(load: Callable):
    """The result of `load`, or the reason of its failure as a sentence."""
    try:
        return load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _keys_that_exist() -> Iterator[None]:
    """quant-videogen 0.1.0 autotunes on names that its kernels do not take, which Triton refuses since 3.5; they are left out."""
    import triton

    real = triton.autotune

    def autotune(configs, key, **options):
        return lambda function: real(configs, [name for name in key if name in function.arg_names], **options)(function)

    triton.autotune = autotune
    try:
        yield
    finally:
        triton.autotune = real


def quant_videogen():
    """encode(x [B, H, S, D], centroids, iterations) -> packed and decode(packed) -> x, two bits in blocks of 64, one stage; or why not."""
    def load():
        with _keys_that_exist():
            from quant_videogen.real.prq import prq_dequant, prq_quant

        def encode(x: Tensor, centroids: int = 256, iterations: int = 2):
            return prq_quant(x, n_stages=1, n_clusters=centroids, block_size=64, num_bits=2, max_iters=iterations,
                             scale_precision=torch.float8_e4m3fn, PACK_OUTPUT_INT8=True, CLUSTER_ID_INT8=True)

        def decode(packed) -> Tensor:
            tables, ids, codes, scales, zeros = packed
            return prq_dequant(centroids_list=tables, cluster_ids_list=ids, residual_quant=codes, scales=scales, block_size=64,
                               num_bits=2, PACK_INPUT_INT8=True, CLUSTER_ID_INT8=True, output_dtype=tables[0].dtype, zeros=zeros)

        return SimpleNamespace(encode=encode, decode=decode)

    return _import(load)


def packed_bytes(packed) -> int:
    """Bytes of the result of `quant_videogen().encode`."""
    tables, ids, codes, scales, zeros = packed
    return sum(part.nbytes for part in (*tables, *ids, codes, scales, zeros) if part is not None)


def flash_kmeans():
    """kmeans(x [B, N, D], count, iterations, start) -> None, or why not."""
    def load():
        from flash_kmeans import batch_kmeans_Euclid

        def kmeans(x: Tensor, count: int, iterations: int, start: Tensor) -> None:
            # a negative tolerance never stops early
            batch_kmeans_Euclid(x, count, max_iters=iterations, tol=-1.0, init_centroids=start)

        return kmeans

    return _import(load)


def sage_attention():
    """An attention function of SageAttention, which rounds queries, keys and values to eight bits; or why not."""
    def load():
        from sageattention import sageattn

        return lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD", is_causal=False)

    return _import(load)
