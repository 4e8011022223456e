"""Triton kernels. Each computes what its reference implementation in `qvg` defines; see `qvg.backends` for the choice between the two.

- `assign`, `update`, `kmeans`, `store`: codebooks
- `encode`, `quantize`: tokens to bit planes on any GPU; `hopper` and its parts: the same on compute capability 9
- `encode_transform`: tokens to bits of components; `eigh`: the components
- `decode`, `reader`, `jobs`: spans to keys and values in the workspace
- `decode_transform`, `bit_vectors`: the same for transform spans; `hopper_decode`: on compute capability 9
- `attend`, `attend_pack`: attention in eight bits on any GPU; `hopper_attend` and its parts: the same on compute capability 9
- `octets`, `octet_pairs`, `halves`: eight channels of a token in the registers of a thread, in float32 or as pairs of float16
- `rotate`: RoPE on a chunk's own tokens
- `tiles`: conversions and platforms; `ops`: the functions that `qvg.backends` imports

Only this folder imports triton, and it is imported when an op first meets a GPU. It imports `qvg` for plain descriptions; nothing in `qvg`
imports it.

What measurements decided:

- A launch takes the host longer than a small kernel takes the device. So K and V share launches wherever they have one shape: in `encode`,
  in the training of codebooks, and in `decode`, where one launch reads all spans of one kind.
- A blocking copy to the device would wait for all queued work. So the hot path has none: job tables go through pinned memory.
- What a kernel is compiled for is named before its launch (`before_launch`). Sizes that change during a video are not specialized.
- Offsets within a tile are 32 bits wide and constant where possible, because constants cost no instruction; offsets of rows have 64 bits.
"""
