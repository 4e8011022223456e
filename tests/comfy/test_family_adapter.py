"""A model family of another pack, with its ComfyUI adapter: the nodes find both through the registry."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.models import FAMILIES, Family


@pytest.fixture
def toy(comfy_modules, monkeypatch):
    """A registered family whose adapter is a module of another pack; its MODEL's network is one linear layer."""
    network, calls = torch.nn.Linear(2, 2, bias=False), []

    def load(state, *, config, dtype=None, disable_dynamic=False):
        calls.append((sorted(state), dtype))
        return SimpleNamespace(model=SimpleNamespace(diffusion_model=network), get_model_object=lambda name: network)

    def quantize(model, settings, node_id=None):
        calls.append((settings.name, node_id))
        return "quantized"

    adapter = ModuleType("another_pack_adapter")
    adapter.load, adapter.quantize, adapter.owns = load, quantize, lambda other: other is network
    monkeypatch.setitem(sys.modules, "another_pack_adapter", adapter)
    FAMILIES.register(Family(
        name="toy", title="Toy", recognizes=lambda state: "weight" in state, sizing={"weight": 2}, adapter="another_pack_adapter",
        sizes=lambda state: SimpleNamespace(layers=1, heads=1, head_dim=2), network=lambda sizes: torch.nn.Linear(2, 2, bias=False)))
    yield SimpleNamespace(network=network, calls=calls)
    FAMILIES.remove("toy")


def test_the_nodes_loop_over_families(toy, tmp_path, monkeypatch):
    from comfyui_qvg.nodes import kv_cache
    from comfyui_qvg.nodes.loader import load_model

    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "toy.safetensors")
    model, found = load_model(str(tmp_path / "toy.safetensors"), "fp8_e4m3fn")
    assert str(found).startswith("toy.safetensors: Toy, 1 layers")
    monkeypatch.setattr(kv_cache.QVGQuantizeKVCache, "hidden", SimpleNamespace(unique_id="7"), raising=False)
    assert kv_cache.QVGQuantizeKVCache.execute(model).args == ("quantized",)
    assert toy.calls == [(["weight"], torch.float8_e4m3fn), ("balanced", "7")]


def test_networks_are_told_apart(toy):
    from comfyui_qvg.nodes import kv_cache
    from comfyui_qvg.nodes.adapters import longcat
    from comfyui_qvg.nodes.adapters.families import adapter_of, family_of

    assert family_of(toy.network).name == "toy" and family_of(torch.compile(toy.network)).name == "toy"
    assert family_of(torch.nn.Linear(1, 1)) is None and adapter_of(FAMILIES["longcat"]) is longcat
    with pytest.raises(ValueError, match=r"Plan has no ComfyUI adapter .* Load a model of Wan 2\.1, LongCat-Video, .*Toy\."):
        adapter_of(Family(name="plan", title="Plan"))
    other = SimpleNamespace(get_model_object=lambda name: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear is not an autoregressive video model: it has no KV cache to quantize"):
        kv_cache.QVGQuantizeKVCache.execute(other)
