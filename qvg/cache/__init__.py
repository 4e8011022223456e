"""What is kept of a run, in how many bits and for how long; and the forecast of it.

| module | what it knows |
|---|---|
| `geometry`, `sizes` | the shape of a model's cache, and its bytes |
| `ageing`, `codebook_lifetime`, `codebooks` | the policy in integers: bits by age, what is dropped first, when a codebook is replaced |
| `limits` | what a memory budget leaves to a layer |
| `kv_cache`, `layer`, `entry`, `stats` | the real cache, and what it counts |
| `forecast`, `context` | the same policy without tensors; contexts that are rebuilt for every segment |
| `read`, `workspace`, `host` | decoding, the buffers for it, and spans in host memory |
"""

from .geometry import Geometry
from .kv_cache import KVCache, shrink
from .stats import CacheStats

__all__ = ["CacheStats", "Geometry", "KVCache", "shrink"]
