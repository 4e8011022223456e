"""Split over GPUs (QVG) in the real ComfyUI, with two processes on the CPU, or on two GPUs with QVG_TEST_GPU=1: what they make, and what is
left of them afterwards."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import longcat_graphs
import world_graphs
from comfy_client import ComfyError, Graph
from comfy_server import ComfyServer
from comfyui_qvg.qvg.demo import NETWORK_FILE, PROMPTS
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import segments, walk_session
from comfyui_qvg.qvg.video import session as storage

if find_spec("ray") is None:
    pytest.skip('install the pack with the extra "test"', allow_module_level=True)
LORA = "split_lora.safetensors"
ON_GPUS = os.environ.get("QVG_TEST_GPU") == "1"


def by_three(heads: int, fits: str) -> str:
    """What is said of three, of which there are no GPUs."""
    return "split over 3 GPUs, but ComfyUI sees 2" if ON_GPUS else f"3 ranks do not divide the {heads} heads of this model; use {fits}"


@pytest.fixture(scope="module", autouse=True)
def lora(comfy_server, tiny_model):
    """One that changes the video."""
    draw = torch.Generator().manual_seed(0)
    weights = CausalWan(WanSizes(256, 1024, 6, 64)).state_dict()
    names = [name for name in weights if name.endswith(("self_attn.q.weight", "ffn.0.weight"))]
    state = {}
    for name in names:
        rows, columns = weights[name].shape
        state[f"diffusion_model.{name.removesuffix('.weight')}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=draw)
        state[f"diffusion_model.{name.removesuffix('.weight')}.lora_A.weight"] = 0.1 * torch.randn(4, columns, generator=draw)
    save_file(state, comfy_server.folder("models", "loras") / LORA)


def build(gpus=2, seconds=1.0, seed=3, cfg=1.0, later=None, save=None, load=None, lora=False, kind="QVGARVideoSampler", **sampler):
    """gpus: None without the node. later: number of a prompt that begins after half a second."""
    graph = Graph()
    model = graph.add("load", "UNETLoader", unet_name=NETWORK_FILE, weight_dtype="default")
    if lora:
        model = graph.add("lora", "LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=1.0)
    if gpus is not None:
        model = graph.add("split", "QVGSplitOverGPUs", model=model, gpus=gpus)
    model = graph.add("quantize", "QVGQuantizeKVCache", model=model)
    latent = graph.add("latent", "QVGEmptyLongVideoLatent", seconds=seconds, frame_rate=16, width=192, height=128, batch_size=1)
    positive = graph.add("prompt", "QVGDemoPrompt", text=PROMPTS[0])
    negative = graph.add("negative", "QVGDemoPrompt", text=PROMPTS[5])
    if later is not None:
        positive = graph.add("at", "QVGPromptAt", conditioning=positive, next=graph.add("next", "QVGDemoPrompt", text=PROMPTS[later]),
                             seconds=0.5, frame_rate=16)
    if kind == "QVGARVideoSampler":
        sampler = {"chunk_frames": 1, **sampler}
        if load:
            sampler["session"] = graph.add("session", "QVGLoadVideoSession", name=load)
    sampler = graph.add("sampler", kind, **sampler)
    if save:
        sampler = graph.add("keep", "QVGSaveVideoSession", sampler=sampler, name=save, every_chunks=1)
    sigmas = graph.add("sigmas", "BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0)
    samples = graph.add("sample", "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=cfg, positive=positive,
                        negative=negative, sampler=sampler, sigmas=sigmas, latent_image=latent)
    graph.add("save", "SaveLatent", samples=samples, filename_prefix="split")
    return graph


def latents(comfy, graph):
    (item,) = comfy.run(graph)["save"]["latents"]
    return load_file(comfy.output_path(item))["latent_tensor"]


def likeness(one, other) -> float:
    """PSNR in dB of latents."""
    return float(10 * ((one.max() - one.min()) ** 2 / (one - other).square().mean()).log10())


def below(server) -> dict[int, str]:
    """The processes that a server started, and those that Ray did."""
    import psutil  # one of ComfyUI's requirements: where they are missing, this module is imported all the same

    found = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        # it may have ended since it was listed
        with suppress(psutil.NoSuchProcess):
            found[child.pid] = child.name()
    return found


@pytest.fixture
def ranks(comfy_server):
    return partial(below, comfy_server)


def others(found: dict[int, str]) -> list[int]:
    return [number for number, name in found.items() if name.startswith("ray::Process")]


def wait_until(holds, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.2)
    return holds()


@pytest.mark.parametrize("case", [{}, {"cfg": 2.0, "later": 4}, {"lora": True}], ids=["plain", "guidance and two prompts", "LoRA"])
def test_the_video_is_that_of_one_process(comfy, ranks, case):
    exact, made = (latents(comfy, build(gpus, **case)) for gpus in (None, 2))
    assert exact.shape == made.shape and len(others(ranks())) == 1
    # rounding may flip a bit of a quantized key; another seed is another video
    assert likeness(exact, made) > likeness(exact, latents(comfy, build(None, **case | {"seed": 4}))) + 10


def test_ranks_are_kept_for_the_next_run_and_end_with_the_graph(start_comfy, tiny_model, comfy_server):
    """Where ComfyUI forgets what is not in the next graph. By itself it remembers as long as it has much free memory."""
    server = start_comfy("--cache-classic")
    latents(server.client, build(seed=11))
    before = others(below(server))
    latents(server.client, build(seed=12))
    assert others(below(server)) == before and len(before) == 1
    # the graph no longer has the node
    latents(server.client, build(None, seed=13))
    assert wait_until(lambda: not below(server)), below(server)


def test_unloading_models_ends_the_ranks(comfy, ranks):
    latents(comfy, build(seed=21))
    assert others(ranks())

    def ended() -> bool:
        # ComfyUI does not wake up for a request that comes while it collects garbage after a run, so this asks again
        comfy.post("/free", {"unload_models": True})
        return not ranks()

    assert wait_until(ended), ranks()


def test_a_session_of_two_processes_is_continued_by_one_and_the_other_way_round(comfy):
    whole, other = (latents(comfy, build(None, seconds=1.0, seed=seed)) for seed in (3, 4))
    for first, then in ((2, None), (None, 2)):
        name = f"split {first}"
        begun = latents(comfy, build(first, seconds=0.5, save=name))
        assert storage.load(comfy.output / "video_sessions" / f"{name}.safetensors").frames_done == begun.shape[2]
        made = latents(comfy, build(then, seconds=1.0, load=name))
        assert torch.equal(made[:, :, :begun.shape[2]], begun)
        assert likeness(whole, made) > likeness(whole, other) + 10


def started(comfy, graph, frames: int) -> str:
    """Queue a long video; returns when so many of its frames or steps are made."""
    since = len(comfy.messages)
    number = comfy.submit(graph)
    comfy.wait_for("progress", lambda data: data["value"] >= frames, timeout=300, since=since)
    return number


def test_stop_between_two_steps_keeps_the_ranks(comfy, ranks):
    number = started(comfy, build(seconds=60.0, seed=31), 4)
    comfy.interrupt()
    assert comfy.wait(number)["save"]["latents"]
    kept = others(ranks())
    assert len(kept) == 1 and latents(comfy, build(seed=32)).isfinite().all() and others(ranks()) == kept
    number = started(comfy, build(seconds=60.0, seed=33, keep_partial=False), 4)
    comfy.interrupt()
    with pytest.raises(ComfyError) as stopped:
        comfy.wait(number)
    assert stopped.value.interrupted and others(ranks()) == kept


def test_a_killed_process_ends_the_video_with_a_sentence_and_a_whole_session(comfy, ranks):
    number = started(comfy, build(seconds=60.0, seed=41, save="killed"), 6)
    for process in others(ranks()):
        os.kill(process, signal.SIGKILL)
    with pytest.raises(ComfyError, match=r"makes a share of this video ended \(it was killed or crashed\)\. Finished chunks"):
        comfy.wait(number)
    saved = storage.load(comfy.output / "video_sessions" / "killed.safetensors")
    assert saved.frames_done >= 1
    assert wait_until(lambda: not ranks()), ranks()
    # the next run starts anew, and goes on
    seconds = (4 * saved.frames_done + 1) / 16
    made = latents(comfy, build(seconds=seconds, seed=41, load="killed"))
    exact, other = (latents(comfy, build(None, seconds=seconds, seed=seed)) for seed in (41, 42))
    assert made.shape[2] == saved.frames_done + 1 and likeness(exact, made) > likeness(exact, other) + 10


@pytest.fixture(scope="module")
def longcat(comfy_server):
    longcat_graphs.write_files(comfy_server)


def continued(gpus=2, **settings):
    """LongCat-Video, over several processes or by one."""
    graph = longcat_graphs.build(**settings)
    if gpus is not None:
        graph["continue"]["inputs"]["model"] = graph.add("split", "QVGSplitOverGPUs", model=["quantize", 0], gpus=gpus)
    return graph


def test_segments_are_those_of_one_process(comfy, longcat, ranks):
    """And a session of two processes is continued by one, and the other way round."""
    exact, other, begun = (longcat_graphs.run(comfy, continued(None, **case)) for case in (
        {"segments": 3}, {"segments": 3, "seed": 4}, {"save": "by one"}))
    longcat_graphs.run(comfy, continued(save="by two"))
    rest, made = (longcat_graphs.run(comfy, continued(segments=3, **case)) for case in ({"load": "by one"}, {}))
    assert len(others(ranks())) == 1
    back = longcat_graphs.run(comfy, continued(None, segments=3, load="by two"))
    assert torch.equal(rest[0][:, :, :begun[0].shape[2]], begun[0])
    for found in (made, rest, back):
        assert found[1] == exact[1] and likeness(exact[0], found[0]) > likeness(exact[0], other[0]) + 30
    # the cache is of half of the heads, and as forecast
    whole, half = (report["history"][-1]["stored_bytes"] for _, _, report in (exact, made))
    assert whole / 2 <= half <= whole / 2 + 200 and half == made[2]["forecast"]["stored_bytes"]


def test_a_process_killed_in_a_segment(comfy, longcat, ranks):
    """With a LoRA, and another sampler; before, a run is stopped."""
    case = {"start": 9, "cfg": 1.0, "lora": "published", "sampler": "dpmpp_2m", "carry": "latents", "steps": 8, "save": "killed segments"}
    number = started(comfy, continued(segments=40, **case), 20)
    kept = others(ranks())
    comfy.interrupt()
    with pytest.raises(ComfyError) as stopped:
        comfy.wait(number)
    assert stopped.value.interrupted and others(ranks()) == kept and len(kept) == 1
    number = started(comfy, continued(segments=40, **case), 20)
    os.kill(kept[0], signal.SIGKILL)
    with pytest.raises(ComfyError, match=r"makes a share of this video ended \(it was killed or crashed\)\. Finished chunks"):
        comfy.wait(number)
    done = segments.load(comfy.output / "video_sessions" / "killed segments.safetensors").made.done
    assert done >= 2 and wait_until(lambda: not ranks()), ranks()
    made = longcat_graphs.run(comfy, continued(segments=done + 1, **case, load="killed segments"))[0]
    exact, other = (longcat_graphs.run(comfy, continued(None, segments=done + 1, **case | {"save": None, "seed": seed}))[0]
                    for seed in (3, 4))
    assert likeness(exact, made) > likeness(exact, other) + 10


def test_what_of_segments_cannot_be_split(comfy, longcat):
    def refused(graph, *words):
        with pytest.raises(ComfyError) as error:
            comfy.run(graph)
        assert all(word in str(error.value) for word in words), error.value

    refused(continued(3), by_three(4, "1, 2, 4"))
    refused(continued(sampler="euler_cfg_pp"), "asks for the prediction of each prompt", "with euler")
    narrow = continued(width=48, height=48)
    refused(narrow, "A latent frame of 3 x 3 tokens cannot be divided evenly among 2 ranks")
    sometimes = continued()
    sometimes.add("some", "ConditioningSetTimestepRange", conditioning=["positive", 0], start=0.5, end=1.0)
    sometimes["continue"]["inputs"]["positive"] = ["some", 0]
    refused(sometimes, "start_percent", "the other GPUs have processes of their own")
    latent = continued()
    empty = latent.add("empty", "EmptyHunyuanLatentVideo", width=64, height=48, length=5, batch_size=1)
    whole = latent.add("whole", "KSampler", model=["split", 0], seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple",
                       denoise=1.0, positive=["positive", 0], negative=["negative", 0], latent_image=empty)
    latent["save"]["inputs"]["samples"] = whole
    for name in ("continue", "size", "count", "monitor", "report"):
        del latent[name]
    refused(latent, "this sampler asks one GPU for the whole video. Connect Continue Video (LongCat, QVG)")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A server with HY-WorldPlay and small VAEs for it."""
    server = ComfyServer(tmp_path_factory.mktemp("world"))
    world_graphs.prepare(server)
    with server:
        yield server


def walked(server, gpus=2, **settings):
    """(latents, frames, the monitor's report, text) of HY-WorldPlay, over several processes or by one."""
    graph = walk_of(gpus, **settings)
    server.client.messages.clear()
    return world_graphs.results(server.client, server.client.run(graph))


def walk_of(gpus=2, **settings):
    graph = world_graphs.build(**settings)
    if gpus is not None:
        graph["walk"]["inputs"]["model"] = graph.add("split", "QVGSplitOverGPUs", model=["quantize", 0], gpus=gpus)
    return graph


def test_walks_are_those_of_one_process(world):
    """And a session of two processes is continued by one, and the other way round."""
    case, half_way = {"memory": "bank", "cfg": 2.0}, {"moves": "right-11"}
    exact, other, begun = (walked(world, None, **case | more) for more in ({}, {"seed": 4}, half_way | {"save": "by one"}))
    walked(world, **case | half_way, save="by two")
    rest, made = (walked(world, **case | more) for more in ({"load": "by one", "path_continues": False}, {}))
    assert len(others(below(world))) == 1
    back = walked(world, None, **case, load="by two", path_continues=False)
    assert torch.equal(rest[0][:, :, :12], begun[0])
    for found in (made, rest, back):
        assert found[1] == exact[1] and likeness(exact[0], found[0]) > likeness(exact[0], other[0]) + 30
        assert found[3].splitlines()[-1] == exact[3].splitlines()[-1]
    # the caches are of half of the heads, and so is the forecast
    for kept in ("history", "forecast"):
        whole, part = ((report[kept][-1] if kept == "history" else report[kept])["stored_bytes"] for _, _, report, _ in (exact, made))
        assert whole / 2 <= part <= whole / 2 + 400


def test_a_process_killed_in_a_walk(world):
    """Of the 8B; before, a walk is stopped."""
    case = {"variant": "8b", "moves": "right-30, w-200", "steps": 4, "save": "killed walk"}
    number = started(world.client, walk_of(**case), 10)
    kept = others(below(world))
    world.client.interrupt()
    with pytest.raises(ComfyError) as stopped:
        world.client.wait(number)
    assert stopped.value.interrupted and others(below(world)) == kept and len(kept) == 1
    number = started(world.client, walk_of(**case), 30)
    os.kill(kept[0], signal.SIGKILL)
    with pytest.raises(ComfyError, match=r"makes a share of this video ended \(it was killed or crashed\)\. Finished chunks"):
        world.client.wait(number)
    done = walk_session.load(world.folder("output") / "video_sessions" / "killed walk.safetensors").frames_done
    assert done >= 24 and wait_until(lambda: not below(world)), below(world)
    case = {"variant": "8b", "moves": f"right-30, w-{done - 27}", "steps": 4}
    made = walked(world, **case, load="killed walk", path_continues=False)[0]
    exact, other = (walked(world, None, **case, seed=seed)[0] for seed in (3, 4))
    assert made.shape[2] == done + 4 and likeness(exact, made) > likeness(exact, other) + 10
    with pytest.raises(ComfyError, match=by_three(2, "1, 2")):
        walked(world, 3, variant="8b")


def test_a_walk_must_fit_where_there_is_least_room(comfy_modules):
    from comfyui_qvg.nodes.adapters.worldplay_scene import WalkMemory
    from comfyui_qvg.nodes.ranks.runs import ROOM
    from in_process import world_model

    memory = WalkMemory(world_model("5b"), PRESETS["balanced"], "bank", (1, 48, 24, 4, 6), [[[torch.zeros(1, 4, 64), {}]]])
    whole = memory.forecast().stored_bytes
    memory.divide(2)
    needed = memory.check(memory.forecast().peak_bytes, ROOM)
    assert whole / 2 <= needed.stored_bytes <= whole / 2 + 400
    with pytest.raises(ValueError, match=r"of 24 latent frames needs .*, but it can have .* on each GPU"):
        memory.check(needed.peak_bytes - 1, ROOM)


def test_what_cannot_be_split(comfy):
    def refused(graph, *words):
        with pytest.raises(ComfyError) as error:
            comfy.run(graph)
        assert all(word in str(error.value) for word in words), error.value

    if not ON_GPUS:
        refused(build(0), "ComfyUI runs on the CPU here", "Set gpus to the number of processes")
    refused(build(3), by_three(2, "1, 2"))
    refused(build(2, kind="SamplerARVideo", num_frame_per_block=1), "this sampler asks one GPU for the whole video")
    compiled = build()
    compiled["compile"] = {"class_type": "TorchCompileModel", "inputs": {"model": ["quantize", 0], "backend": "inductor"}}
    compiled["sample"]["inputs"]["model"] = ["compile", 0]
    refused(compiled, "works in ComfyUI's own process", "Remove the node that sets it")
    combined = build()
    combined["both"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["prompt", 0], "conditioning_2": ["negative", 0]}}
    combined["sample"]["inputs"]["positive"] = ["both", 0]
    refused(combined, "2 conditions are combined in the positive prompt")


def test_one_gpu_is_the_model_as_it_was(comfy, ranks):
    assert torch.equal(latents(comfy, build(1, seed=51)), latents(comfy, build(None, seed=51)))


def test_a_closed_server_leaves_nothing(start_comfy, tiny_model, comfy_server):
    for end in ("terminate", "kill"):
        server = start_comfy()
        latents(server.client, build(seed=61))
        found = below(server)
        # two agents of Ray, which hold nothing, look for it once a minute
        holding = [number for number, name in found.items() if not name.endswith("Agent")]
        assert others(found)
        getattr(server.process, end)()
        server.process.wait(120)
        assert wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in holding)), end  # noqa: B023


def test_without_ray_the_node_says_what_to_install(comfy_modules, monkeypatch):
    from comfyui_qvg.nodes.split_gpus import QVGSplitOverGPUs
    from in_process import causal_model

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="Install it there with `pip install ray`, and restart ComfyUI"):
        QVGSplitOverGPUs.execute(causal_model(), 2)
