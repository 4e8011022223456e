"""The settings of a KV cache, in one frozen object.

`QVGSettings.preset("balanced")` is all that most people need; `dataclasses.replace` changes single fields.
Every value is checked when the object is made, and errors are sentences that can be shown to the user.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from .codec.tensor_settings import PLAIN_BITS, TensorSettings, require, require_bits, require_int
from .registry import CODECS

__all__ = ["ATTENTIONS", "COARSE", "CODECS", "PLAIN_BITS", "PRESETS", "QVGSettings", "TensorSettings"]

VERSION = 1
ATTENTIONS = ("auto", "exact", "fast")
# bits per element up to which what a span leaves out outweighs what attention in eight bits rounds off
COARSE = 2.5
# fields of settings that older sessions hold under another name
RENAMED = {"epoch_frames": "codebook_frames"}


def _refuse_unknown(fields: dict, kind: type) -> None:
    unknown = set(fields) - set(kind.__dataclass_fields__)
    require(not unknown, f"Unknown settings: {', '.join(sorted(unknown))}.")


@dataclass(frozen=True)
class QVGSettings:
    """Everything that decides what a cache keeps and in how many bits.

    codec: "transform" (principal components), "qvg" (codebooks and bit planes), "paper" (QVG as released) or "plain" (elements as the
        model made them, or int8); or any other in `registry.CODECS`.
    key, value: how the two tensors are stored once they are old.
    sink_frames, sink_bits: the first latent frames, which are never evicted, and the least bits per element they hold.
    recent_frames, recent_bits: the newest latent frames hold at least this much until they age.
    window_frames: latent frames kept besides the sink; older ones are evicted. 0 keeps all.
    budget_gib: most GiB that the cache may take, workspace included. 0 sets no limit. Above it, the oldest spans lose bits and are then
        evicted.
    offload: keep spans in host memory (pinned, for a GPU) and copy them to the device one layer at a time. The budget then covers what
        stays on the device: codebooks, the workspace and two layers.
    host_gib: most GiB of host memory that offloaded spans may take, by the same rule. 0 sets no limit.
    codebook_frames: most latent frames that share a codebook; one that no longer fits is replaced earlier (see `cache.codebook_lifetime`).
        With the transform codec, the latent frames in which new bases are made although the current one fits.
    iterations: k-means iterations per codebook.
    seed: of the private generator that k-means draws from.
    attention: "exact"; "fast", in eight bits to what is held in at most `COARSE`; or "auto", fast where that is known to lose next to
        nothing and to be faster (`attention.choice`).
    """

    name: str = "balanced"
    codec: str = "qvg"
    key: TensorSettings = field(default_factory=TensorSettings)
    value: TensorSettings = field(default_factory=TensorSettings)
    sink_frames: int = 3
    sink_bits: float = 4
    recent_frames: int = 3
    recent_bits: float = 4
    window_frames: int = 0
    budget_gib: float = 0.0
    codebook_frames: int = 24
    iterations: int = 8
    seed: int = 0
    offload: bool = False
    host_gib: float = 0.0
    attention: str = "auto"

    def __post_init__(self):
        require(isinstance(self.name, str), f"name is {self.name!r}; it must be a text.")
        for name in ("key", "value"):
            value = getattr(self, name)
            require(isinstance(value, TensorSettings), f"{name} is {value!r}; it must be a TensorSettings.")
        if not isinstance(self.codec, str) or self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}; choose one of {', '.join(CODECS)}.")
        for name in ("sink_bits", "recent_bits"):
            object.__setattr__(self, name, require_bits(name, getattr(self, name)))
        for name in ("sink_frames", "recent_frames", "window_frames"):
            require_int(name, getattr(self, name), 0, 100_000)
        require_int("codebook_frames", self.codebook_frames, 1, 100_000)
        require_int("iterations", self.iterations, 1, 100)
        require_int("seed", self.seed, 0, 2**63 - 1)
        for name in ("budget_gib", "host_gib"):
            value = getattr(self, name)
            require(type(value) in (int, float) and 0 <= value < 100_000, f"{name} is {value!r}; give GiB, or 0 for no limit.")
        require(isinstance(self.offload, bool), f"offload is {self.offload!r}; it must be true or false.")
        require(self.offload or not self.host_gib, "host_gib limits offloaded spans, but offload is off. Turn it on, or set it to 0.")
        CODECS[self.codec].check(self)
        require(self.attention in ATTENTIONS, f"attention is {self.attention!r}; choose one of {', '.join(ATTENTIONS)}.")
        require(self.attention != "fast" or self.key_value_bits <= COARSE,
                f"attention is 'fast', in eight bits to what is held in at most {COARSE:g}, but these settings hold old frames in "
                f"{self.key_value_bits:g}. Set attention to auto, or choose fewer bits or another preset, such as Balanced.")

    @property
    def key_value_bits(self) -> float:
        """Of old frames, keys or values, whichever have more."""
        return max(self.key.bits, self.value.bits)

    @property
    def kept(self) -> QVGSettings:
        """These settings with the defaults of those that decide nothing that is stored: where it lies, and how it is attended to."""
        return replace(self, offload=False, host_gib=0.0, attention="auto")

    @property
    def changes_nothing(self) -> bool:
        """Whether all keys and values stay as the model made them, on the device and without eviction, as in an ordinary cache."""
        forgets = self.window_frames or self.budget_gib or self.offload
        return self.codec == "plain" and self.key.bits == self.value.bits == 16 and not forgets

    @staticmethod
    def preset(name: str) -> QVGSettings:
        """One of `PRESETS` by name. Raises ValueError that lists the names."""
        require(name in PRESETS, f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return PRESETS[name]

    def both(self, **changes) -> QVGSettings:
        """These settings with the same changes to K and V."""
        return replace(self, key=replace(self.key, **changes), value=replace(self.value, **changes))

    def to_json(self) -> str:
        fields = asdict(self)
        for name in ("key", "value"):
            if not fields[name]["options"]:
                del fields[name]["options"]
        if self.attention == "auto":
            # earlier releases read what has no new field
            del fields["attention"]
        return json.dumps({"version": VERSION, **fields})

    @staticmethod
    def from_json(text: str) -> QVGSettings:
        """The inverse of `to_json`. Raises ValueError for another version or an unknown field."""
        fields = json.loads(text)
        require(isinstance(fields, dict), "These settings are not a JSON object.")
        version = fields.pop("version", None)
        require(version == VERSION, f"These settings have version {version!r}; this release reads version {VERSION}.")
        for old, new in RENAMED.items():
            if old in fields:
                fields[new] = fields.pop(old)
        _refuse_unknown(fields, QVGSettings)
        tensors = {}
        for name in ("key", "value"):
            if name in fields:
                tensors[name] = fields.pop(name)
                require(isinstance(tensors[name], dict), f"The settings of {name} are not a JSON object.")
                _refuse_unknown(tensors[name], TensorSettings)
                tensors[name] = TensorSettings(**tensors[name])
        return QVGSettings(**fields, **tensors)


def _transformed(name: str, bits: float, sink_bits: float, recent_bits: float) -> QVGSettings:
    tensor = TensorSettings(bits=bits, stages=0)
    return QVGSettings(name=name, codec="transform", key=tensor, value=tensor, sink_bits=sink_bits, recent_bits=recent_bits)


PRESETS = {
    "off": QVGSettings(
        name="off", codec="plain", key=TensorSettings(bits=16, stages=0), value=TensorSettings(bits=16, stages=0),
        sink_frames=0, recent_frames=0, sink_bits=16, recent_bits=16),
    "quality": _transformed("quality", 2.5, 16, 4),
    "balanced": _transformed("balanced", 1.25, 4, 4),
    "smallest": _transformed("smallest", 0.75, 3, 3),
    "tiny": _transformed("tiny", 0.5, 2, 2),
    "paper": QVGSettings(
        name="paper", codec="paper", key=TensorSettings(group=64), value=TensorSettings(group=64),
        sink_frames=0, recent_frames=0, iterations=2, codebook_frames=1),
}
