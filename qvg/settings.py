"""What a person may choose about a KV cache, in one frozen object.

`QVGSettings.preset("balanced")` is the whole interface for most people; `dataclasses.replace` changes one choice.
Every value is checked when the object is made, and the error is a sentence that can be shown as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

VERSION = 1
CODECS = ("plain", "qvg", "paper")
GAINS = ("energy", "unbiased", "mse")
PLANE_BITS = (1, 2, 3, 4)
PLAIN_BITS = (8, 16)
MAX_STAGES = 4
MAX_CENTROIDS = 256
# fields of settings that older sessions hold under another name
RENAMED = {"epoch_frames": "codebook_frames"}

# a codebook with fewer tokens a centroid memorizes its tokens instead of finding what they share
TOKENS_PER_CENTROID = 36
# as many as the released code's 256 centroids have in three latent frames of Self-Forcing
PAPER_TOKENS_PER_CENTROID = 18


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_int(name: str, value, low: int, high: int, hint: str = "") -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(good, f"{name} is {value!r}; it must be a whole number from {low} to {high}.{hint}")


def _refuse_unknown(fields: dict, kind: type) -> None:
    unknown = set(fields) - set(kind.__dataclass_fields__)
    _require(not unknown, f"Unknown settings: {', '.join(sorted(unknown))}.")


@dataclass(frozen=True)
class TensorSettings:
    """How K or V alone is stored.

    bits: planes of the residual (1 to 4), or 8 or 16 for plain storage without codebooks.
    stages: codebooks subtracted one after the other (0 to 4), paper section 4.2.
    centroids: entries of each codebook (1 to 256); fewer are used where a codebook would see under 36 tokens each, or 18
        with the paper codec.
    group: channels that share a scale; a head narrower than this is one group.
    gain: what the levels preserve: "energy" (for keys: softmax weights keep their size), "unbiased" (for values: averages
        of many tokens come out right) or "mse" (Lloyd's own levels, which shrink).
    symmetric: paper codec only: absmax levels around zero, or min-max levels with a zero point.
    """

    bits: int = 2
    stages: int = 1
    centroids: int = MAX_CENTROIDS
    group: int = 64
    gain: str = "energy"
    symmetric: bool = True

    def __post_init__(self):
        allowed = PLANE_BITS + PLAIN_BITS
        _require(type(self.bits) is int and self.bits in allowed,
                 f"bits is {self.bits!r}; choose 1, 2, 3 or 4 planes, or 8 or 16 for plain storage.")
        _require_int("stages", self.stages, 0, MAX_STAGES)
        _require_int("centroids", self.centroids, 1, MAX_CENTROIDS, " An id is one byte.")
        _require(type(self.group) is int and self.group in (8, 16, 32, 64, 128, 256),
                 f"group is {self.group!r}; choose 8, 16, 32, 64, 128 or 256 channels to a scale.")
        _require(self.gain in GAINS, f"gain is {self.gain!r}; choose one of {', '.join(GAINS)}.")
        _require(isinstance(self.symmetric, bool), f"symmetric is {self.symmetric!r}; it must be true or false.")

    def groups(self, head_dim: int) -> int:
        """Scales that one token of one head holds."""
        group = min(self.group, head_dim)
        _require(head_dim % group == 0,
                 f"This model's heads have {head_dim} channels, which groups of {group} do not divide; choose a smaller group size.")
        return head_dim // group

    def codebook_size(self, tokens: int, codec: str = "qvg") -> int:
        """Centroids that a codebook trained on `tokens` tokens of a head gets."""
        return max(1, min(self.centroids, tokens // (PAPER_TOKENS_PER_CENTROID if codec == "paper" else TOKENS_PER_CENTROID)))


@dataclass(frozen=True)
class QVGSettings:
    """Everything that decides what a cache keeps and in how many bits.

    codec: "qvg" (codebooks and bit planes), "paper" (QVG as released) or "plain" (every number in the model's own type).
    key, value: how the two tensors are stored once they are old.
    sink_frames, sink_bits: the first latent frames, kept for good, and the least bits they hold (1 to 4 planes, 8 or 16).
    recent_frames, recent_bits: the newest latent frames hold at least this much until they age.
    window_frames: latent frames kept besides the sink; older ones leave. 0 keeps all.
    budget_gib: bytes that the cache may hold, workspace included, in GiB. 0 sets no limit. Over it, the oldest spans lose
        planes, then leave.
    offload: spans wait in host memory (pinned, where the device is a GPU) and visit the device a layer at a time. The budget then is of
        what stays on the device: codebooks, the workspace and two layers.
    host_gib: bytes that offloaded spans may take in host memory, in GiB, under the same rule. 0 sets no limit.
    codebook_frames: latent frames that share one codebook at most; one that no longer fits is replaced earlier (see `lifetime`).
    iterations: k-means steps a codebook.
    seed: of the private generator that k-means draws from.
    """

    name: str = "balanced"
    codec: str = "qvg"
    key: TensorSettings = field(default_factory=TensorSettings)
    value: TensorSettings = field(default_factory=TensorSettings)
    sink_frames: int = 3
    sink_bits: int = 4
    recent_frames: int = 3
    recent_bits: int = 4
    window_frames: int = 0
    budget_gib: float = 0.0
    codebook_frames: int = 24
    iterations: int = 8
    seed: int = 0
    offload: bool = False
    host_gib: float = 0.0

    def __post_init__(self):
        _require(isinstance(self.name, str), f"name is {self.name!r}; it must be a text.")
        for name in ("key", "value"):
            value = getattr(self, name)
            _require(isinstance(value, TensorSettings), f"{name} is {value!r}; it must be settings of a tensor.")
        _require(self.codec in CODECS, f"codec is {self.codec!r}; choose one of {', '.join(CODECS)}.")
        for name in ("sink_bits", "recent_bits"):
            value = getattr(self, name)
            _require(type(value) is int and value in PLANE_BITS + PLAIN_BITS, f"{name} is {value!r}; choose 1, 2, 3, 4, 8 or 16.")
        for name in ("sink_frames", "recent_frames", "window_frames"):
            _require_int(name, getattr(self, name), 0, 100_000)
        _require_int("codebook_frames", self.codebook_frames, 1, 100_000)
        _require_int("iterations", self.iterations, 1, 100)
        _require_int("seed", self.seed, 0, 2**63 - 1)
        for name in ("budget_gib", "host_gib"):
            value = getattr(self, name)
            _require(type(value) in (int, float) and 0 <= value < 100_000, f"{name} is {value!r}; give GiB, or 0 for no limit.")
        _require(isinstance(self.offload, bool), f"offload is {self.offload!r}; it must be true or false.")
        _require(self.offload or not self.host_gib, "host_gib limits offloaded spans, but offload is off. Turn it on, or set it to 0.")
        for name, tensor in (("key", self.key), ("value", self.value)) if self.codec == "plain" else ():
            _require(tensor.bits in PLAIN_BITS,
                     f"{name} is to hold {tensor.bits} bits, but the plain codec (the preset Off) has no planes; "
                     "choose 8 or 16 bits, or another preset.")
        if self.codec == "paper":
            for tensor in (self.key, self.value):
                _require(tensor.bits in (2, 4), f"The paper codec stores 2 or 4 bits, not {tensor.bits}; "
                                                "choose 2 or 4, or the qvg codec.")
                _require(tensor.group in (16, 32, 64, 128),
                         f"The paper codec scales blocks of 16, 32, 64 or 128 channels, not {tensor.group}.")
            _require(not self.recent_frames or self.recent_bits in PLAIN_BITS,
                     f"The paper codec cannot narrow a span from {self.recent_bits} bits; set recent_frames to 0, or recent_bits "
                     "to 8 or 16.")
            _require(not self.sink_frames or self.sink_bits in (2, 4, *PLAIN_BITS),
                     f"The paper codec cannot hold a sink in {self.sink_bits} bits; choose 2, 4, 8 or 16.")

    @property
    def changes_nothing(self) -> bool:
        """Whether all keys and values stay as the model made them, for good and on the device: what a cache without settings does."""
        forgets = self.window_frames or self.budget_gib or self.offload
        return self.codec == "plain" and self.key.bits == self.value.bits == 16 and not forgets

    @staticmethod
    def preset(name: str) -> QVGSettings:
        """One of `PRESETS` by name. Raises ValueError with the names there are."""
        _require(name in PRESETS, f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return PRESETS[name]

    def both(self, **changes) -> QVGSettings:
        """These settings with the same changes made to K and to V."""
        return replace(self, key=replace(self.key, **changes), value=replace(self.value, **changes))

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> QVGSettings:
        """The inverse of `to_json`. Raises ValueError for another version or an unknown field."""
        fields = json.loads(text)
        _require(isinstance(fields, dict), "These settings are no object of fields.")
        version = fields.pop("version", None)
        _require(version == VERSION, f"These settings have version {version!r}; this release reads version {VERSION}.")
        for old, new in RENAMED.items():
            if old in fields:
                fields[new] = fields.pop(old)
        _refuse_unknown(fields, QVGSettings)
        tensors = {}
        for name in ("key", "value"):
            if name in fields:
                tensors[name] = fields.pop(name)
                _require(isinstance(tensors[name], dict), f"The settings of {name} are no object of fields.")
                _refuse_unknown(tensors[name], TensorSettings)
                tensors[name] = TensorSettings(**tensors[name])
        return QVGSettings(**fields, **tensors)


PRESETS = {
    "off": QVGSettings(
        name="off", codec="plain", key=TensorSettings(bits=16, stages=0), value=TensorSettings(bits=16, stages=0),
        sink_frames=0, recent_frames=0, sink_bits=16, recent_bits=16),
    "quality": QVGSettings(
        name="quality", key=TensorSettings(bits=4, stages=2, group=64), value=TensorSettings(bits=4, stages=2, group=64),
        sink_bits=16),
    "balanced": QVGSettings(
        name="balanced", key=TensorSettings(stages=2, centroids=128, group=128),
        value=TensorSettings(stages=2, centroids=128, group=128)),
    "smallest": QVGSettings(
        name="smallest", key=TensorSettings(bits=1, stages=2, centroids=128, group=128),
        value=TensorSettings(bits=1, stages=2, centroids=128, group=128), codebook_frames=48),
    "paper": QVGSettings(
        name="paper", codec="paper", key=TensorSettings(group=64), value=TensorSettings(group=64),
        sink_frames=0, recent_frames=0, iterations=2, codebook_frames=1),
}
