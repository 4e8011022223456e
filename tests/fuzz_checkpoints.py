"""Checkpoints for `fuzz`: of Wan and of LongCat-Video in both layouts, flat and in containers, as safetensors, in parts, and as .pt, the
format before torch 1.6 included."""

from __future__ import annotations

import collections
import io
import json
import random
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.models import FAMILIES
from comfyui_qvg.qvg.models.checkpoint import open_checkpoint
from comfyui_qvg.qvg.models.longcat import PUBLISHED, LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes, causal_metadata

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64,
         torch.float8_e4m3fn]
PREFIXES = ["", "model.", "model.diffusion_model.", "module.", "_orig_mod.", "generator_ema.model.", "a.b.c.", "blocks.", "blocks.0."]
CONTAINERS = ["generator_ema", "generator", "model", "state_dict", "optimizer", "x", "", "generator_lora"]
CONFIGS = ["{", "[]", "null", "3", '{"transformer": 3}', '{"transformer": {"num_layers": 1000000000}}', '{"transformer": {"eps": NaN}}',
           '{"transformer": {"dim": 1000000000, "eps": 1e-5}}', 10_000 * '{"transformer":', "\ud800".encode("utf-8", "replace").decode()]
LAYERS = ["0", "1", "2", "7", "999", "4294967296", "99999999999999999999", "-1", "01", "x", "", "1e3", "²"]


def states() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    wan = CausalWan(WanSizes(dim=128, ffn_dim=16, layers=2, text_dim=8)).bfloat16().state_dict()
    long = LongCat(LongCatSizes(dim=32, head_dim=16, ffn_dim=64, layers=2, text_dim=8, time_dim=16, freq_dim=16)).state_dict()
    fused: dict[str, list[torch.Tensor]] = {}
    for name, tensor in long.items():
        fused.setdefault(PUBLISHED.published_name(name)[0], []).append(tensor)
    packed = wan | {"blocks.1.ffn.0.weight": torch.zeros(16, 64, dtype=torch.uint8), "blocks.1.ffn.0.weight_scale": torch.ones(16, 8),
                    "blocks.1.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    return [wan, dict(long), {name: torch.cat(parts) for name, parts in fused.items()}, packed]


def strange(draw: random.Random, x: torch.Tensor):
    """A tensor that is none for a layer, or another one."""
    return draw.choice([
        lambda: x.to_sparse(), lambda: x.to("meta"), lambda: torch.zeros(1, dtype=x.dtype).expand(x.shape),
        lambda: torch.zeros(1, dtype=x.dtype).expand(10**9, 10**6), lambda: torch.zeros(10**12, 0), lambda: torch.zeros(0),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8), lambda: torch.nn.Parameter(x.float()), lambda: x.flatten(),
        lambda: x[None], lambda: x[:0], lambda: x[..., :-1], lambda: torch.cat([x, x]), lambda: x.transpose(0, -1), lambda: x.sum(),
        lambda: torch.zeros((1,) * 40), lambda: x.to(draw.choice(TYPES)), lambda: torch.zeros(2**16, 8, dtype=torch.uint8)])()


def change_state(draw: random.Random, state: dict, plain: bool) -> str:
    """plain: only what safetensors can hold."""
    name, kind = draw.choice(sorted(key for key in state if isinstance(key, str))), draw.randrange(7)
    if kind == 0:
        del state[name]
    elif kind == 1:
        tensor = state.pop(name)
        words = name.split(".")
        words[draw.randrange(len(words))] = draw.choice(["x", "", "weight", "blocks", "scale_weight", "\n", *LAYERS])
        state[".".join(words)] = tensor
    elif kind == 2:
        layer = draw.choice(LAYERS)
        for key in [key for key in state if str(key).startswith("blocks.1.")]:
            if isinstance(state[key], torch.Tensor):
                state[f"blocks.{layer}.{key[9:]}"] = state[key].detach() if state[key].layout != torch.strided else state[key].clone()
    elif kind == 3:
        for layer in range(draw.choice([3, 300, 5000])):
            state[f"blocks.{layer}.x"] = torch.zeros(1)
    elif kind == 4 and not plain:
        others = [None, 3, "x", [torch.zeros(1)], {"a": torch.zeros(1)}, (1,), torch.float32, collections.OrderedDict(state)]
        state[draw.choice([name, 3, "x", None])] = draw.choice(others)
    else:
        x = strange(draw, state[name]) if isinstance(state[name], torch.Tensor) else torch.zeros(3)
        if plain and not (x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized and x.numel() < 10**7):
            x = torch.zeros(10**9, 0)
        state[name] = x.detach().contiguous().clone() if plain else x
    return f"{kind} {name}"


def change_bytes(draw: random.Random, data: bytearray) -> str:
    kind, at = draw.randrange(5), draw.choice([draw.randrange(len(data)), draw.randrange(min(len(data), 4000)),
                                               len(data) - 1 - draw.randrange(min(len(data), 400))])
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[at:at + 8] = draw.choice([draw.randbytes(8), 8 * b"\xff", struct.pack("<q", draw.choice([10**12, -1, 0, 2**62]))])
    elif kind == 3:
        del data[at:at + draw.randrange(1, 64)]
    else:
        data[at:at] = data[:draw.randrange(1, 4000)]
    return f"bytes {kind} at {at}"


def change_header(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file whose own header lies."""
    head = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:head])
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    entry, value = header[name], draw.choice([0, 1, -1, 10**9, 10**12, 2**62, 2**64, 1.5, None, "x", []])
    kind = draw.randrange(5)
    if kind == 0:
        entry["shape"] = draw.choice([[value], [value, 0], [*entry["shape"], value], [0] * 9, [1] * 1000, value])
    elif kind == 1:
        entry["data_offsets"][draw.randrange(2)] = value
    elif kind == 2:
        entry["dtype"] = draw.choice(["F64", "F32", "F16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "F8_E8M0", "C64", "x", value])
    elif kind == 3:
        entry["data_offsets"] = header[draw.choice(sorted(set(header) - {"__metadata__"}))]["data_offsets"]
    else:
        header["__metadata__"] = draw.choice([{"config": value}, value, {"config": draw.choice(CONFIGS)}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[head:]


def change_zip(draw: random.Random, data: bytes) -> bytes:
    """A .pt whose archive is another one: compressed, without an entry, or with another one's content."""
    made, kind = io.BytesIO(), draw.randrange(5)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    name = draw.choice([name for name in entries if name.endswith("data.pkl")] + [draw.choice(sorted(entries))])
    if kind == 0:
        del entries[name]
    elif kind == 1:
        change = bytearray(entries[name] or b"\0")
        for _ in range(draw.choice([1, 3])):
            change_bytes(draw, change) if change else None
        entries[name] = bytes(change)
    elif kind == 2:
        entries[name] = bytes(32 * (1 << 20))
    elif kind == 3:
        entries = {draw.choice(["../", "/", "x/", ""]) + name.partition("/")[2]: content for name, content in entries.items()}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if kind in (2, 4) else zipfile.ZIP_STORED) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return made.getvalue()


class Checkpoints:
    def __init__(self, folder: Path):
        self.folder, self.states, self.story, self.seed, self.opened = folder, states(), "", 0, False
        # what torch imports when it is first needed is not the files' memory
        for state in self.states:
            torch.save(state, folder / "m.pt")
            self.use(folder / "m.pt", random.Random(0))

    def make(self, draw: random.Random) -> Path:
        for old in self.folder.iterdir():
            old.unlink()
        plain, steps = draw.random() < 0.5, []
        state = dict(draw.choice(self.states))
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            steps.append(change_state(draw, state, plain))
        prefix = draw.choice(PREFIXES) if draw.random() < 0.4 else ""
        state = {prefix + key if isinstance(key, str) else key: x for key, x in state.items()}
        path = self._safetensors(draw, state, steps) if plain else self._pickled(draw, state, steps)
        self.story = f"{path.name} {prefix}: {'; '.join(steps)}"
        return path

    def _safetensors(self, draw: random.Random, state: dict, steps: list[str]) -> Path:
        metadata = {"config": draw.choice(CONFIGS)} if draw.random() < 0.15 else None
        if draw.random() < 0.15:
            count = draw.choice([2, 2, 2, 3, 0, 99999])
            names = [f"m-{number:05}-of-{count:05}.safetensors" for number in (1, 2)]
            for number, name in enumerate(names):
                save_file(dict(list(state.items())[number::2]), self.folder / name, metadata)
            return self.folder / draw.choice(names)
        path = self.folder / "m.safetensors"
        save_file(state, path, metadata)
        kind = draw.random()
        if kind < 0.2:
            path.write_bytes(change_header(draw, path.read_bytes()))
            steps.append("header")
        elif kind < 0.35:
            self._damage(draw, path, steps)
        return path

    def _pickled(self, draw: random.Random, state: dict, steps: list[str]) -> Path:
        path, content = self.folder / draw.choice(["m.pt", "m.pth", "m.ckpt", "m.bin"]), state
        for _ in range(draw.choice([0, 0, 1, 1, 2, 40])):
            content = {draw.choice(CONTAINERS): content} | ({draw.choice(CONTAINERS): {}} if draw.random() < 0.2 else {})
        if draw.random() < 0.05:
            content[draw.choice(CONTAINERS)] = content
        if draw.random() < 0.05:
            content = draw.choice([[content], torch.zeros(3), 3, None, {"x": print}, {}])
        new = draw.random() < 0.75
        torch.save(content, path, _use_new_zipfile_serialization=new)
        kind = draw.random()
        if kind < 0.25 and new:
            path.write_bytes(change_zip(draw, path.read_bytes()))
            steps.append("zip")
        elif kind < 0.5:
            self._damage(draw, path, steps)
        return path

    @staticmethod
    def _damage(draw: random.Random, path: Path, steps: list[str]) -> None:
        data = bytearray(path.read_bytes())
        steps.append(change_bytes(draw, data))
        path.write_bytes(data)

    def use(self, path: Path, draw: random.Random) -> str:
        """What opens must be a network whose weights are all there and all real."""
        try:
            state, found = open_checkpoint(path)
        except ValueError as error:
            if not str(error).startswith(tuple(file.name for file in self.folder.iterdir())):
                raise TypeError(f"a refusal that names no file: {error}") from error
            raise
        self.opened = True
        json.loads(causal_metadata(found.sizes, found.config)["config"])
        family = FAMILIES[found.family]
        with torch.device("meta"):
            expected = family.network(family.sizes(state)).state_dict()
        if not expected.keys() <= state.keys():
            return "weights are missing"
        if any(f"{key[:-6]}comfy_quant" not in state and state[key].shape != weight.shape for key, weight in expected.items()):
            return "weights of another shape"
        # all numbers are there to be read
        total = sum(float(weight.float().sum()) for key, weight in state.items() if key in expected)
        return "" if isinstance(total, float) and str(found) else "nothing"
