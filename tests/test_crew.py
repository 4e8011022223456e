"""One video by two processes that Ray starts, on the CPU or on two GPUs: what they make, what they leave behind."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from several_gpus import DEVICES

from comfyui_qvg.qvg.demo import LATENT, embed_prompt, load_tiny
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler, crew
from comfyui_qvg.qvg.video.prepare import cache_of
from comfyui_qvg.qvg.video.rank_plans import Plan, Prompts
from comfyui_qvg.qvg.video.ranks import Leader, RankEnded
from comfyui_qvg.qvg.video.recorder import OVERHEAD_BYTES, session_bytes

if find_spec("ray") is None:
    pytest.skip('install the pack with the extra "test"', allow_module_level=True)
GRID = LATENT[0] // 2, LATENT[1] // 2
SET_BEFORE = {*os.environ}
ENTRIES = [(0, embed_prompt("red circle"), "a"), (3, embed_prompt("blue star moving left"), "b")]
PARENT = """
import sys, time
from comfyui_qvg.qvg.video.crew import Crew
crew = Crew(2, "cpu")
print("started", flush=True)
if sys.argv[1:] != ["ends"]:
    time.sleep(600)
"""
MEMBER = """
import sys
import torch
from test_crew import load_tiny, plan_of, together
from comfyui_qvg.qvg.video.crew import Crew
torch.set_num_threads(1)
network = load_tiny()[0]
crew = Crew(2, "cpu", sys.argv[1])
made = together(crew, plan_of(network, frames=3), network)
crew.stop()
print("made", made.shape[2])
"""


@pytest.fixture(scope="module")
def device(request):
    """Of the first rank."""
    return "cuda:0" if getattr(request, "param", "cpu") == "cuda" else "cpu"


@pytest.fixture(scope="module")
def network(device):
    return load_tiny()[0].to(device)


on_both = pytest.mark.parametrize("device", DEVICES, indirect=True)


def plan_of(network, seed: int = 1, weights: str = "tiny", frames: int = 6) -> Plan:
    return Plan("wan", network.sizes, weights, PRESETS["balanced"], Run(frames=frames, seed=seed), GRID, 1, [(1.0, ENTRIES)])


def alone(network, seed: int = 1) -> torch.Tensor:
    plan = plan_of(network, seed)
    device = next(network.parameters()).device
    model = CachedNetwork(network, [Condition(Prompts(ENTRIES, network), cache_of(network, plan.settings, plan.run, GRID, device=device))])
    return video(Sampler(model, plan.run, (1, 16, *LATENT), device=device))


def video(sampler, each=lambda: None) -> torch.Tensor:
    parts = []
    for event in sampler:
        if isinstance(event, ChunkDone):
            parts.append(event.latents)
            each()
    return torch.cat(parts, 2).cpu()


def together(found: crew.Crew, plan: Plan, network, each=lambda: None) -> torch.Tensor:
    with found.video(plan, network) as ranks, Leader(plan.model(network, ranks, found.device), ranks) as leader:
        return video(Sampler(leader, plan.run, (1, 16, *LATENT), device=found.device), each)


@pytest.fixture
def pair(device):
    """Two ranks for all tests that leave them whole."""
    if not PAIR or PAIR[0].stopped or PAIR[0].device != torch.device(device):
        for found in PAIR:
            found.stop()
        PAIR[:] = [crew.Crew(2, device)]
    return PAIR[0]


@pytest.fixture
def no_pair():
    """No test that ran before in this process has left its ranks."""
    while PAIR:
        PAIR.pop().stop()
    assert wait_until(lambda: not below())


@pytest.fixture(scope="module", autouse=True)
def others():
    """Processes that earlier tests of this process left running, such as a resource tracker."""
    OTHERS.update(below())
    yield
    while PAIR:
        PAIR.pop().stop()
    OTHERS.clear()


OTHERS: dict[int, str] = {}
PAIR: list[crew.Crew] = []


def below(process: int | None = None) -> dict[int, str]:
    found = {}
    for child in psutil.Process(process).children(recursive=True):
        # it may have ended since it was listed
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = child.name()
    return {number: name for number, name in found.items() if number not in OTHERS}


def ranks_below() -> list[int]:
    return [number for number, name in below().items() if name.startswith("ray::Process")]


def wait_until(holds, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def close(one: torch.Tensor, other: torch.Tensor) -> float:
    """PSNR in dB of latents."""
    return float(10 * ((one.max() - one.min()) ** 2 / (one - other).square().mean()).log10())


def test_a_cluster_that_is_not_there(no_pair):
    """The first test, because Ray reads how long it shall look when it is imported."""
    with pytest.raises(ValueError, match=r"There is no Ray cluster at 127\.0\.0\.1:1 "):
        crew.Crew(2, "cpu", "127.0.0.1:1")
    assert not below()


@on_both
def test_the_video_is_that_of_one_process(pair, network):
    exact = alone(network)
    made = together(pair, plan_of(network), network)
    # a bit of a quantized key may flip; another seed is another video
    assert close(exact, made) > close(exact, alone(network, seed=2)) + 20
    assert not pair.stopped


@on_both
def test_weights_are_sent_once(pair, network):
    together(pair, plan_of(network), network)
    assert pair.prepare("tiny")[0]
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    assert not pair.prepare("other")[0]
    exact = alone(other)
    assert close(exact, together(pair, plan_of(other, weights="other"), other)) > close(exact, alone(network)) + 20


def test_the_size_of_a_session_counts_the_heads_of_all(pair, network):
    plan = plan_of(network)
    cache = cache_of(network, PRESETS["balanced"], Run(frames=6), GRID)
    one = Sampler(CachedNetwork(network, [Condition(Prompts(ENTRIES, network), cache)]), Run(frames=6), (1, 16, *LATENT))
    with pair.video(plan, network) as ranks, Leader(plan.model(network, ranks, "cpu"), ranks) as leader:
        shared = session_bytes(Sampler(leader, Run(frames=6), (1, 16, *LATENT)))
    # but for padding
    assert shared - OVERHEAD_BYTES == pytest.approx(session_bytes(one) - OVERHEAD_BYTES, rel=1e-3) and shared > OVERHEAD_BYTES


@on_both
def test_nothing_listens_beyond_this_machine(pair, network):
    found, beyond = [psutil.Process(), *psutil.Process().children(recursive=True)], []

    def look():
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                beyond.extend((process.name(), place.laddr) for place in process.net_connections()
                              if place.status == psutil.CONN_LISTEN and not place.laddr.ip.endswith("127.0.0.1"))

    together(pair, plan_of(network), network, look)
    assert len(found) > 5 and beyond == []
    assert not any("GLOO" in name or "NCCL" in name or "USAGE" in name for name in os.environ.keys() - SET_BEFORE)


def test_ray_kills_no_rank_where_others_fill_the_memory(pair):
    raylet, = (psutil.Process(number) for number, name in below().items() if name == "raylet")
    assert raylet.environ()["RAY_memory_monitor_refresh_ms"] == "0"
    # the main log of the raylet says whether it watches
    logs = "".join(path.read_text() for path in Path(pair._folder).glob("session_*/logs/raylet.out"))
    assert "MemoryMonitor disabled" in logs


def test_ray_has_time_to_start_on_a_busy_machine(pair):
    raylet, = (psutil.Process(number) for number, name in below().items() if name == "raylet")
    assert crew.RAY.items() <= raylet.environ().items() and crew.JOIN.keys().isdisjoint(raylet.environ())


@on_both
def test_an_error_between_passes_leaves_the_ranks_for_the_next_video(pair, network):
    def interrupt():
        raise KeyError("interrupt")

    before = ranks_below()
    with pytest.raises(KeyError):
        together(pair, plan_of(network), network, interrupt)
    assert not pair.stopped and together(pair, plan_of(network), network).shape[2] == 6
    assert ranks_below() == before and len(before) == 1


@on_both
def test_an_error_of_a_rank_is_told(pair, network):
    """What the first rank cannot know: here, a network that is not of the sizes that it says."""
    plan = plan_of(network, weights="wrong")
    object.__setattr__(plan, "sizes", plan.sizes.__class__(dim=256, ffn_dim=64, layers=1, text_dim=8))
    with pytest.raises(RankEnded, match=r"ended \(Error\(s\) in loading state_dict"):
        together(pair, plan, network)
    assert pair.stopped and wait_until(lambda: not below())


@on_both
def test_a_killed_rank_ends_the_video_and_leaves_nothing(no_pair, network, device):
    """Here, Ray notices it four seconds later."""
    found = crew.Crew(2, device)
    folder, kept = Path(found._folder), []
    raylet, = (psutil.Process(number) for number, name in below().items() if name == "raylet")
    slow = threading.Timer(4, raylet.resume)

    def kill():
        ranks = ranks_below()
        raylet.suspend()
        slow.start()
        kept.append([os.kill(number, signal.SIGKILL) for number in ranks])

    with pytest.raises(RankEnded, match=r"ended \(it was killed or crashed\)\. Finished chunks are in its session"):
        together(found, plan_of(network), network, kill)
    assert kept == [[None]]
    assert found.stopped and wait_until(lambda: not below()) and not folder.exists()
    found.stop()


def test_nothing_outlives_its_process():
    """Not even where it is killed. Two agents of Ray, which hold nothing, look for it once a minute."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "started\n"
    started = {number: name for number, name in below(parent.pid).items() if not name.endswith("Agent")}
    assert {"raylet", "gcs_server", "ray::Process"} <= set(started.values())
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(psutil.pid_exists, started)))


def test_a_process_ends_its_ranks_and_says_nothing():
    """Where nobody stops the crew, neither."""
    done = subprocess.run([sys.executable, "-c", PARENT, "ends"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows asks for a privilege before it links folders")
def test_a_python_whose_path_has_a_space(tmp_path):
    folder = tmp_path / "my ComfyUI"
    folder.symlink_to(sys.prefix)
    python = folder / Path(sys.executable).relative_to(sys.prefix)
    done = subprocess.run([python, "-c", PARENT, "ends"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


def test_a_python_that_does_not_start(no_pair, monkeypatch):
    monkeypatch.setattr(crew, "TO_START", 8)
    monkeypatch.setattr(crew, "_started_with", lambda env: {"env_vars": env, "py_executable": "/nowhere/python"})
    with pytest.raises(RuntimeError, match=f"within 8 seconds: the machine is busy, or Ray cannot run {re.escape(sys.executable)} there"):
        crew.Crew(2, "cpu")
    assert wait_until(lambda: not below())


def test_a_ray_of_another_pack_is_used_and_left(no_pair, network):
    import ray

    ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        found = crew.Crew(2, "cpu")
        assert together(found, plan_of(network), network).shape[2] == 6
        with pytest.raises(ValueError, match=r"is connected to the Ray at .*, so it cannot join 10\.0\.0\.1:6379"):
            crew.Crew(2, "cpu", "10.0.0.1:6379")
        found.stop()
        assert ray.is_initialized() and wait_until(lambda: not ranks_below())
        # and if that pack ends its Ray while ranks are there, it ends them
        found = crew.Crew(2, "cpu")
        ray.shutdown()
        with pytest.raises(RankEnded, match="another node pack ended Ray"):
            found.prepare("tiny")
        assert not ray.is_initialized(), "asking Ray would have started another one"
    finally:
        ray.shutdown()
    assert found.stopped and wait_until(lambda: not below())


@pytest.fixture
def cluster(tmp_path):
    """The address of a Ray cluster of this machine alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["start", "--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--num-gpus", "0",
               "--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", str(crew.OBJECT_STORE)]
    script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    with open(tmp_path / "log", "w") as log:
        head = subprocess.Popen([sys.executable, "-c", script, *command], stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    try:
        assert wait_until(lambda: "Ray runtime started" in (tmp_path / "log").read_text(), 300), (tmp_path / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        below = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        psutil.wait_procs(below, 30)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


@pytest.mark.skipif(" " in sys.executable, reason="no machine of a cluster starts a Python whose path has a space (Ray 2.60)")
def test_a_cluster_gets_the_pack_and_is_left(cluster):
    """In a process of its own, because Ray reads how it is to log in when it is imported."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", MEMBER, cluster], env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=600)
    assert done.stdout == "made 3\n", done.stderr


def test_without_ray_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="Install it there with `pip install ray`"):
        crew.Crew(2, "cpu")
