"""A model family in one file and one call: recognized, planned, opened and run, and gone again when it is removed."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.commands import cli
from comfyui_qvg.qvg.models import FAMILIES, Family, ModelShape, open_checkpoint
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.models.lora import convert
from comfyui_qvg.qvg.report.plan import plan
from comfyui_qvg.qvg.settings import QVGSettings
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler


@dataclass(frozen=True)
class ToySizes:
    layers: int
    heads: int
    head_dim: int = 16

    @classmethod
    def read(cls, state):
        return cls(layers=sum(name.startswith("layers.") for name in state), heads=state["embed.weight"].shape[0] // cls.head_dim)


class ToyNetwork(nn.Module):
    """Attention and nothing else; a token is a latent pixel."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, dim = sizes, sizes.heads * sizes.head_dim
        self.embed, self.out = nn.Linear(4, dim, bias=False), nn.Linear(dim, 4, bias=False)
        self.layers = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=False) for _ in range(sizes.layers))

    def forward(self, x, timestep, context, attend):
        # [B, C, F, H, W] -> [B, T, dim]
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + context
        for number, layer in enumerate(self.layers):
            q, k, v = layer(tokens).unflatten(-1, (3, self.sizes.heads, self.sizes.head_dim)).unbind(2)
            tokens = tokens + attend(number, q, k, v).flatten(2)
        return self.out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


TOY = Family(
    name="toy", title="Toy", blocks="layers", embeddings=("embed",),
    shapes={"toy-2": ModelShape(layers=2, heads=2, head_dim=16, stride=8, size=(64, 48), chunk_frames=2, size_name="the toy of the tests")},
    recognizes=lambda state: {"embed.weight", "layers.0.weight", "out.weight"} <= state.keys(),
    sizes=ToySizes.read, network=ToyNetwork, sizing={"embed.weight": 2, "layers.0.weight": 2})


@pytest.fixture(autouse=True)
def toy():
    yield FAMILIES.register(TOY)
    FAMILIES.remove("toy")


@pytest.fixture
def state():
    draw = torch.Generator().manual_seed(7)
    return {name: 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in ToyNetwork(ToySizes(2, 2)).state_dict().items()}


def test_its_checkpoint_is_recognized(tmp_path, state):
    """Inside a training checkpoint, beside averaged weights and a critic, and as a flat file."""
    wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
    other = {name: tensor + 1 for name, tensor in wrapped.items()}
    torch.save({"critic": other, "generator": other, "generator_ema": wrapped}, tmp_path / "toy.pt")
    save_file(state, tmp_path / "toy.safetensors")
    for name in ("toy.pt", "toy.safetensors"):
        opened, found = open_checkpoint(tmp_path / name)
        assert opened.keys() == state.keys() and all(torch.equal(opened[key], state[key]) for key in state)
        assert (found.family, found.layers, found.heads, found.dtype) == ("toy", 2, 2, "float32")
    assert str(found) == "toy.safetensors: Toy, 2 layers, 2 heads (the toy of the tests), float32"


@pytest.mark.parametrize(("change", "sentence"), [
    ({"layers.1.weight": torch.zeros(95, 32)}, r"layers\.1\.weight as float32 of shape \(95, 32\), but the network .* \(96, 32\) there"),
    ({"layers.x.weight": torch.zeros(1)}, r"layers\.x\.weight, which is not part of a numbered layer"),
    ({"embed.weight": torch.zeros(32)}, r"embed\.weight with shape \(32,\), where 2 numbers above 0 belong"),
    ({"layers.1.weight": None}, None)])
def test_a_damaged_checkpoint_is_refused(tmp_path, state, change, sentence):
    path = tmp_path / "toy.safetensors"
    save_file({name: tensor for name, tensor in (state | change).items() if tensor is not None}, path)
    if sentence is None:
        assert open_checkpoint(path)[1].layers == 1, "a toy of one layer is whole"
        return
    with pytest.raises(ValueError, match=rf"^toy\.safetensors .*{sentence}"):
        open_checkpoint(path)


def test_it_is_planned(capsys):
    assert list(MODELS)[-1] == "toy-2"
    found = plan("toy-2", seconds=2)
    assert found["presets"]["off"]["bf16_bytes"] == 2 * 2 * 2 * 2 * 16 * 6 * 8 * found["latent_frames"]
    assert cli.main(["plan", "--model", "toy-2", "--seconds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def made(network, sizes, settings):
    """Latents of a short video, and the statistics of its cache."""
    cache = KVCache(settings, layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=(6, 8), rope=TOY.rope,
                    dtype=torch.float32, max_frames=8, chunk_frames=2)
    sampler = Sampler(CachedNetwork(network, [Condition(0.1, cache)]), Run(frames=8, chunk_frames=2), (1, 4, 6, 8))
    done = [event for event in sampler if isinstance(event, ChunkDone)]
    return torch.cat([event.latents for event in done], 2), done[-1].stats


def test_it_runs(state):
    network = FAMILIES["toy"].open(state)
    exact, plain = made(network, network.sizes, QVGSettings.preset("off"))
    settings = replace(QVGSettings.preset("quality").both(group=16), sink_frames=0, recent_frames=0)
    quantized, stats = made(network, network.sizes, settings)
    assert exact.shape == (1, 4, 8, 6, 8) and exact.isfinite().all()
    assert torch.equal(exact[:, :, :2], quantized[:, :, :2]), "the first chunk reads no history"
    assert 0 < (quantized - exact).square().mean() < 0.01 * exact.square().mean()
    assert stats.stored_bytes < plain.stored_bytes / 3


def test_keys_that_would_name_another_model(tmp_path, state):
    """A family says which of the fragments that stand for other models are its own."""
    path = tmp_path / "toy.safetensors"
    save_file(state | {"double_blocks.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is a HunyuanVideo model"):
        open_checkpoint(path)
    FAMILIES.remove("toy")
    FAMILIES.register(replace(TOY, own=("double_blocks.",)))
    assert open_checkpoint(path)[1].family == "toy"


def test_its_loras_are_read(state):
    shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in state.items()}
    file = {"transformer.layers.1.lora_A.weight": torch.zeros(2, 32), "transformer.layers.1.lora_B.weight": torch.zeros(96, 2)}
    mapped = convert(file, shapes, TOY)
    assert mapped.taken == 2 and set(mapped.weights) == {"layers.1.lora_down.weight", "layers.1.lora_up.weight"}


def test_it_is_gone_when_it_is_removed(tmp_path, state):
    save_file(state, tmp_path / "toy.safetensors")
    FAMILIES.remove("toy")
    assert "toy-2" not in MODELS
    with pytest.raises(ValueError, match=r"toy\.safetensors is not a video model of a known family .* Wan 2\.1 .*, LongCat-Video"):
        open_checkpoint(tmp_path / "toy.safetensors")


def test_a_family_that_can_only_be_planned():
    with pytest.raises(ValueError, match="No network of Toy is part of this pack; it can be planned, not run"):
        Family(name="toy", title="Toy", shapes=TOY.shapes).open({})


def test_every_family_names_its_adapter_as_data():
    """The names are of modules in nodes/, which qvg/ never imports."""
    assert [family.adapter for family in FAMILIES.values()] == [
        ".nodes.adapters.wan", ".nodes.adapters.longcat", ".nodes.adapters.worldplay_5b", ".nodes.adapters.worldplay_8b", ""]
