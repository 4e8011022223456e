"""What `qvg.backends` imports of the kernels: a function for each op, and where they run besides a GPU."""

from __future__ import annotations

from triton.runtime import JITFunction

from .assign import assign, assign_kernel
from .attend import attend
from .eigh import eigh
from .encode import encode
from .encode_transform import encode_transform
from .join import join
from .kmeans import kmeans
from .project import project
from .reader import read, recover
from .rotate import rotate, rotate_chunk
from .store import store
from .update import update

OPS = {
    "assign": assign, "update": update, "kmeans": kmeans, "store": store, "encode": encode, "encode_transform": encode_transform,
    "eigh": eigh, "rotate": rotate, "rotate_chunk": rotate_chunk, "project": project, "decode": read, "recover": recover, "attend": attend,
    "join": join,
}
# with TRITON_INTERPRET=1 kernels run in Python on the CPU, which only tests ask for
FORCED_DEVICES = () if isinstance(assign_kernel, JITFunction) else ("cpu",)
