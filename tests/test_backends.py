"""Which backend runs an op, and the reasons given for the others."""

import builtins
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.backends import Backend, launches, registry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec import kmeans, smoothing

X, TABLE = torch.randn(2, 30, 64), torch.randn(2, 5, 64)


def test_importing_compiles_and_imports_nothing():
    code = ("import sys, comfyui_qvg.qvg.cache.kv_cache, comfyui_qvg.qvg.backends; "
            "assert 'triton' not in sys.modules and not any('comfyui_qvg.kernels' in name for name in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_use_the_reference(device):
    for op, backend, reason in backends.report(device):
        assert op in backends.OPS and backend == "torch" and device in reason


def test_forced_triton_says_why_not_on_mps():
    with backends.force("triton"):
        assert "not mps" in backends.refusal("assign", "mps") or "triton cannot be imported" in backends.refusal("assign", "mps")


def test_unknown_backend():
    with pytest.raises(ValueError, match="choose one of triton, torch"), backends.force("cuda"):
        pass


def test_unknown_op():
    with pytest.raises(ValueError, match="no op 'asign'; the ops are assign, update"):
        backends.run("asign", kmeans._assign, X, TABLE)
    with pytest.raises(ValueError, match="pass at least one tensor"):
        backends.run("assign", kmeans._assign, 1)


class Toy:
    """A backend for one op, as another pack would register it; it refuses fewer than ten tokens."""

    def __init__(self):
        self.calls = 0

    def assign(self, x, centroids):
        if x.shape[1] < 10:
            raise backends.Unsupported("it needs ten tokens")
        self.calls += 1
        return torch.cdist(x.float(), centroids.float()).argmin(-1)


@pytest.fixture
def toy():
    toy = Toy()
    backends.register(Backend("toy", devices=("cpu",), ops={"assign": toy.assign}))
    yield toy
    backends.remove("toy")


def test_a_registered_backend_runs_its_op_first(toy):
    """It comes before the built-in one and the reference, which run what it does not implement or refuses, and other devices."""
    calls = {}
    with backends.recording(calls):
        assert torch.equal(kmeans.assign(X, TABLE), kmeans._assign(X, TABLE))
        kmeans.assign(X[:, :5], TABLE)
        kmeans.update(X, torch.zeros(2, 30, dtype=torch.int64), TABLE)
    assert toy.calls == 1 and backends.names() == ["toy", "triton", "torch"]
    said = backends.summary(calls)
    assert said["assign"].startswith("toy; 1 of 2 calls in torch (it needs ten tokens; ") and "toy" not in said["update"]
    rows = {op: (name, reason) for op, name, reason in backends.report("cpu")}
    assert rows["assign"] == ("toy", "") and rows["update"][0] == "torch" and not backends.refusal("assign", "cpu")
    assert "toy kernels need cpu, not mps" in backends.refusal("assign", "mps")
    with backends.force("torch"):
        kmeans.assign(X, TABLE)
    with backends.force("toy"), pytest.raises(backends.Unsupported, match="assign cannot run on toy: it needs ten tokens"):
        kmeans.assign(X[:, :5], TABLE)
    with backends.force("toy"), pytest.raises(backends.Unsupported, match="no toy kernel for update"):
        kmeans.update(X, torch.zeros(2, 30, dtype=torch.int64), TABLE)
    assert toy.calls == 1


def test_a_backend_of_lower_priority_runs_after_the_others(monkeypatch):
    """After a kernel fails, the next backend runs the call, not the reference."""
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    toy, calls = Toy(), {}
    install(monkeypatch, fail)
    backends.register(Backend("toy", devices=("cpu",), ops={"assign": toy.assign}, priority=-1))
    with backends.recording(calls):
        kmeans.assign(X, TABLE)
    why = "the Triton kernel failed (RuntimeError: Failed to find C compiler)"
    assert toy.calls == 1 and backends.summary(calls) == {"assign": f"toy ({why})"}
    assert backends.report("cpu")[0] == ("assign", "toy", why)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"name": "triton"}, "already a backend named 'triton'"), ({"name": "torch"}, "choose another name"),
    ({"ops": {"asign": len}}, "no op 'asign'; the ops are assign, update")])
def test_a_backend_that_cannot_be_registered(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        backends.register(replace(Backend("toy", devices=("cpu",), ops={}), **changes))
    assert backends.names() == ["triton", "torch"]


def test_force_ends_with_its_block():
    with backends.force("torch"), pytest.raises(RuntimeError), backends.force("triton"):
        raise RuntimeError
    assert "cpu" in backends.refusal("assign", "cpu")


@pytest.fixture
def without_triton(monkeypatch):
    """An installation that has no triton, as on macOS."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("comfyui_qvg.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    # a copy that has not imported its module yet
    only(monkeypatch, replace(backends.TRITON))


def test_without_triton(without_triton):
    assert kmeans.assign(X, TABLE).shape == (2, 30)
    assert "No module named 'triton'" in backends.refusal("assign", "cuda")
    with backends.force("triton"), pytest.raises(backends.Unsupported, match="No module named 'triton'"):
        kmeans.assign(X, TABLE)


def test_unsupported_shape_falls_back_and_a_forced_backend_says_why():
    pytest.importorskip("triton")
    x = torch.randn(2, 30, 48, device="cuda" if torch.cuda.is_available() else "cpu")
    assert kmeans.assign(x, x[:, :5]).shape == (2, 30)
    book, = smoothing.train([x.bfloat16().transpose(0, 1)], 2, 5, 1, torch.Generator(), [None])
    assert book.values(1).isfinite().all()
    with backends.force("triton"), pytest.raises(backends.Unsupported, match="heads of 48 channels"):
        kmeans.assign(x, x[:, :5])


@pytest.fixture
def broken_kernel(monkeypatch):
    """A device whose compiler fails."""
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    install(monkeypatch, fail)


def only(monkeypatch, *found):
    """These backends alone, in a process where no kernel has failed yet."""
    monkeypatch.setattr(registry._backends, "_known", {backend.name: backend for backend in found})
    monkeypatch.setattr(launches.FAILURES, "_reasons", {})


def install(monkeypatch, assign):
    """A kernel on this device."""
    only(monkeypatch, replace(backends.TRITON, devices=("cuda", "cpu"), ops={"assign": assign}))


def test_a_kernel_that_fails_is_given_up_with_its_reason(broken_kernel):
    with backends.force("triton"), pytest.raises(RuntimeError, match="C compiler"):
        kmeans.assign(X, TABLE)
    assert kmeans.assign(X, TABLE).shape == (2, 30)
    assert "C compiler" in backends.refusal("assign", "cpu")


class Kernel:
    """Assigns like the reference, with one variant for each head dim. fails: whether it does for these tokens."""

    def __init__(self, fails):
        self.fails, self.tried = fails, []

    def __call__(self, x, centroids):
        backends.before_launch("assign", x.shape[-1])
        self.tried.append(x.shape)
        if self.fails(x):
            raise RuntimeError("Triton Error [CUDA]: misaligned address")
        return kmeans._assign(x, centroids)


def assigned(tokens: int, dim: int = 64) -> None:
    x = torch.randn(2, tokens, dim)
    assert torch.equal(kmeans.assign(x, x[:, :5]), kmeans._assign(x, x[:, :5]))


def test_a_failed_launch_leaves_other_shapes_to_the_kernel(monkeypatch, caplog):
    kernel, calls = Kernel(lambda x: x.shape[1] == 30), {}
    install(monkeypatch, kernel)
    with backends.recording(calls):
        for tokens in (30, 30, 31, 30, 32):
            assigned(tokens)
    assert [shape[1] for shape in kernel.tried] == [30, 31, 32], "what failed is not tried again at the same shapes, and at no others"
    assert backends.summary(calls) == {
        "assign": "triton; 3 of 5 calls in torch (the Triton kernel failed (RuntimeError: Triton Error [CUDA]: misaligned address))"}
    assert len(caplog.records) == 1 and "misaligned address" in caplog.text


def test_a_kernel_that_fails_at_every_shape_is_given_up_for_its_variant_alone(monkeypatch):
    """A compiler that fails takes seconds each time; another head dim is compiled anew."""
    kernel = Kernel(lambda x: x.shape[-1] == 64)
    install(monkeypatch, kernel)
    for tokens in range(30, 40):
        assigned(tokens)
        assigned(tokens, 128)
    assert sum(shape[-1] == 64 and shape[1] < 30 + backends.GIVE_UP for shape in kernel.tried) == backends.GIVE_UP
    assert sum(shape[-1] == 128 for shape in kernel.tried) == 10
    calls = {}
    with backends.recording(calls):
        assigned(50)
    assert "misaligned address" in backends.summary(calls)["assign"]


def test_other_launches_do_not_pay_for_a_failed_one(monkeypatch):
    """The shapes of a call are only collected for a launch that has failed somewhere."""
    install(monkeypatch, Kernel(lambda x: x.shape[-1] == 64))
    assigned(30)
    monkeypatch.setattr(launches, "shapes_of", lambda arguments: pytest.fail("shapes were collected"))
    assigned(30, dim=32)


def test_a_launch_without_memory_is_no_failure_of_the_kernel(monkeypatch):
    """The caller frees memory and retries, as when torch's own allocator fails."""
    def full(x, centroids):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    install(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        kmeans.assign(X, TABLE)
    assert not backends.refusal("assign", "cpu")


@pytest.mark.parametrize("error", [KeyError("a listener of the progress text"), KeyboardInterrupt()])
def test_what_a_listener_raises_is_no_failure_of_the_kernel(monkeypatch, error):
    """It reaches the caller, as an interrupt must, and the kernel is used afterwards."""
    def listener(sentence):
        raise error

    kernel, calls = Kernel(lambda x: False), {}
    install(monkeypatch, kernel)
    monkeypatch.setattr(launches, "_launched", set())
    with backends.on_compile(listener), pytest.raises(type(error)) as raised:
        kmeans.assign(X, TABLE)
    assert raised.value is error and not backends.refusal("assign", "cpu")
    said = []
    with backends.on_compile(said.append), backends.recording(calls):
        assigned(30)
    assert backends.summary(calls) == {"assign": "triton"}
    assert said == [TOLD.format("assign"), ""], "it was not compiled then, so listeners hear of it now"


def test_a_kind_of_span_that_fails_is_the_one_given_up(monkeypatch):
    """Of several launches of a read the failing one is given up, not the last prepared one; other kinds still use the kernel."""
    ops = pytest.importorskip("comfyui_qvg.kernels.ops")
    from comfyui_qvg.kernels import reader

    only(monkeypatch, replace(backends.TRITON, devices=("cuda", "cpu")))
    real = reader.decode_kernel

    class Broken:
        def __getitem__(self, grid):
            def launch(*arguments, **meta):
                if meta["BITS"] == 4:
                    raise RuntimeError("out of registers")
                return real[grid](*arguments, **meta)
            return launch

    monkeypatch.setattr(reader, "decode_kernel", Broken())
    assert ops.OPS["decode"] is reader.read
    settings = replace(PLANES["balanced"], sink_frames=1, sink_bits=4, recent_frames=0)
    found = []
    for variant in (settings, replace(settings, sink_frames=0)):
        cache = KVCache(variant, layers=1, heads=1, head_dim=64, grid=(2, 2), rope=Rope, device=DEVICE, dtype=torch.float32, chunk_frames=1)
        for frame in range(3 + backends.GIVE_UP):
            q, k, v = torch.randn(3, 1, 4, 1, 64, device=DEVICE)
            CachedAttention(cache, start_frame=frame, frames=1, store=True)(0, q, k, v)
        found.append(cache.stats().backends["decode"])
    assert found[0].startswith("torch (") and "out of registers" in found[0]
    assert found[1] == "triton"
    assert {launch[3].bits for launch, _ in launches.FAILURES.items()} == {4}


def test_the_bytes_of_a_cache_come_with_its_backends_and_their_reasons():
    """Heads of 48 channels have no kernel: a run's report says so, on a GPU and in the interpreter."""
    pytest.importorskip("triton")
    found = {}
    for dim in (48, 64):
        # one centroid, so that no span waits for more tokens
        settings = PLANES["balanced"].both(group=16, centroids=1)
        cache = KVCache(settings, layers=1, heads=1, head_dim=dim, grid=(2, 2), rope=Rope, device=DEVICE, dtype=torch.float32)
        for frame in range(2):
            q, k, v = torch.randn(3, 1, 4, 1, dim, device=DEVICE)
            CachedAttention(cache, start_frame=frame, frames=1, store=True)(0, q, k, v)
        found[dim] = cache.stats().as_dict()["backends"]
        cache.free()
        assert not cache.stats().backends
    assert set(found[48]) >= {"encode", "decode", "rotate_chunk"}
    why = "heads of 48 channels" if DEVICE == "cuda" else "need a CUDA or ROCm device, not cpu"
    assert all(said.startswith("torch (") and why in said for said in found[48].values())
    assert DEVICE == "cpu" or set(found[64].values()) == {"triton"}


@pytest.fixture
def fresh(monkeypatch):
    """A process that has launched no kernel yet."""
    pytest.importorskip("triton")
    monkeypatch.setattr(launches, "_launched", set())


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLD = "Compiling GPU kernels (first run): {}"


def test_listeners_hear_of_a_kernel_before_it_is_compiled(fresh):
    """Once for each variant, and again when it is compiled; to all listeners, and to none outside their blocks."""
    x, table = X.to(DEVICE), TABLE.to(DEVICE)
    said, outer = [], []
    with backends.force("triton"):
        with backends.on_compile(outer.append):
            with backends.on_compile(said.append):
                kmeans.assign(x, table)
                assert said == [TOLD.format("assign"), ""]
                kmeans.assign(x[:, :11], table[:, :2])
                assert len(said) == 2, "other sizes are not compiled for"
                kmeans.assign(x.half(), table)
                assert said[2:] == said[:2], "another dtype is"
            kmeans.update(x, torch.zeros(2, 30, dtype=torch.int64, device=DEVICE), table)
        assert outer == [*said, TOLD.format("update"), ""]
        kmeans.assign(x.repeat(1, 1, 2), table.repeat(1, 1, 2))
    assert len(outer) == 6


def test_listeners_hear_of_every_variant_of_a_video_once(fresh):
    """Older frames are decoded by another variant, in the middle of a run."""
    settings = replace(PLANES["balanced"], sink_frames=1, recent_frames=1)
    cache = KVCache(settings, layers=1, heads=1, head_dim=64, grid=(2, 2), rope=Rope, device=DEVICE, dtype=torch.float32, chunk_frames=1)
    said = []
    with backends.force("triton"), backends.on_compile(said.append):
        for frame in range(4):
            q, k, v = torch.randn(3, 1, 4, 1, 64, device=DEVICE)
            CachedAttention(cache, start_frame=frame, frames=1, store=True)(0, q, k, v)
            if frame == 1:
                early = len(said)
    # fused kernels run instead of the first three, and the others are of another codec, of world models of fast attention, or of pieces
    told = {sentence.rpartition(" ")[2] for sentence in said if sentence}
    assert told == set(backends.OPS) - {"assign", "update", "rotate", "project", "encode_transform", "eigh", "attend", "join"}
    assert said[-1] == "" and TOLD.format("decode") in said[early:]
    seen = len(said)
    with backends.force("triton"), backends.on_compile(said.append):
        CachedAttention(cache, start_frame=4, frames=1, store=True)(0, q, k, v)
    assert len(said) == seen


def test_listeners_do_not_hear_of_a_failed_kernel_again(fresh, broken_kernel, monkeypatch):
    def fail(*arguments):
        backends.before_launch("assign")
        raise RuntimeError("Failed to find C compiler")

    install(monkeypatch, fail)
    said = []
    with backends.on_compile(said.append):
        assert kmeans.assign(X, TABLE).shape == kmeans.assign(X, TABLE).shape == (2, 30)
    assert said == [TOLD.format("assign"), ""]


def test_info_prints_backends_and_reasons(capsys):
    # a GPU in the cloud may lack what the other commands need
    pytest.importorskip("av", reason="commands encode video")
    from comfyui_qvg.qvg.commands import cli

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in backends.OPS)
    assert torch.cuda.is_available() or "not cpu" in text


def test_gradients_use_the_reference():
    x = torch.randn(1, 4, 2, 128, requires_grad=True)
    Rope(128, (2, 2)).apply(x, 0, 1).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)
    with backends.force("triton"), pytest.raises(backends.Unsupported, match=r"no gradients|need a CUDA|cannot be imported"):
        Rope(128, (2, 2)).apply(x, 0, 1)
