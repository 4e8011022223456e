"""Files that the nodes write, in the real ComfyUI: chosen when sampling starts, never over one that is there, closed whatever happens."""

import time
from types import SimpleNamespace

import av
import pytest
import torch
from test_long_video import build

from comfy_client import ComfyError
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.video import CachedNetwork, Condition, Run, Sampler
from comfyui_qvg.qvg.video import session as storage
from longcat_graphs import build as continue_video
from longcat_graphs import write_files
from random_models import write_random_models


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    write_random_models(comfy_server, "long", 7)
    write_files(comfy_server)


def named(prefix, seed=31, number=1, frame_rate=16, **changes):
    """A graph that streams to a file of a prefix; with number 2, to another one from a second sampler, at a frame rate of its own."""
    graph = build(seconds=0.5, own={}, stream="MP4 (H.264)", seed=seed, **changes)
    graph["stream"]["inputs"]["filename_prefix"] = prefix
    if number == 2:
        graph.add("stream 2", "QVGStreamVideo", **graph["stream"]["inputs"] | {"frame_rate": frame_rate})
        graph.add("sample 2", "SamplerCustom", **graph["sample"]["inputs"] | {"sampler": ["stream 2", 0], "noise_seed": seed + 1})
        graph.add("save 2", "SaveLatent", samples=["sample 2", 0], filename_prefix="second")
        graph.add("path 2", "PreviewAny", source=["stream 2", 1])
    return graph


def frames(path):
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_of_a_graph_has_a_file_of_its_own(comfy):
    """Only the seed differs, so ComfyUI keeps what Stream Video to File gave out the first time."""
    folder = comfy.output / "runs"
    comfy.run(named("runs/ball"))
    first = (folder / "ball_00001_.mp4").read_bytes()
    comfy.run(named("runs/ball", seed=32))
    assert names(folder) == ["ball_00001_.mp4", "ball_00002_.mp4"]
    assert (folder / "ball_00001_.mp4").read_bytes() == first != (folder / "ball_00002_.mp4").read_bytes()
    assert [frames(path) for path in sorted(folder.iterdir())] == [9, 9]


@pytest.mark.parametrize("frame_rate", [16, 8])
def test_two_nodes_of_a_graph_have_two_files(comfy, frame_rate):
    """Both may give out their paths before the first samples. Of two nodes with equal inputs ComfyUI runs one, so their path is one."""
    outputs = comfy.run(named(f"pair {frame_rate}/ball", number=2, frame_rate=frame_rate))
    folder = comfy.output / f"pair {frame_rate}"
    assert names(folder) == ["ball_00001_.mp4", "ball_00002_.mp4"] and [frames(path) for path in sorted(folder.iterdir())] == [9, 9]
    said = {outputs[name]["text"][0] for name in ("path", "path 2")}
    assert said == {str(folder / name) for name in names(folder)[:1 if frame_rate == 16 else 2]}


def test_images_of_two_runs_do_not_mix(comfy):
    for seed in (31, 32):
        graph = named("images/ball", seed=seed)
        graph["stream"]["inputs"]["format"] = "PNG images"
        comfy.run(graph)
    assert names(comfy.output / "images") == [f"ball_{run:05d}__{number:06d}.png" for run in (1, 2) for number in range(9)]


def test_tokens_are_those_of_cores_save_nodes(comfy):
    """Against Save Image with the same prefix in the same run, and what core's page would have filled in is refused."""
    prefix = "tokens/%year%-%month%-%day% %width%x%height%"
    graph = named(prefix)
    graph["images"]["inputs"]["filename_prefix"] = prefix
    comfy.run(graph)
    expected = time.strftime("%Y-%m-%d 96x64")
    made = names(comfy.output / "tokens")
    assert f"{expected}_00001_.mp4" in made and any(name.startswith(expected) and name.endswith(".png") for name in made)


@pytest.mark.parametrize(("prefix", "words"), [
    ("a/%date:yyyy-MM-dd%", r"%date:yyyy-MM-dd%, which is not known"), ("%KSampler.seed%", "is not known"),
    ("", "has no name"), ("../../etc/x", "leads out of"), ("/etc/x", "leads out of"), ("a:b", "has a ':'"), ("x" * 250, "long"),
    ("a/\x07", "control"), ("aux.x/y", "for a device")])
def test_names_that_cannot_be_are_refused(comfy, prefix, words):
    before = names(comfy.output)
    for graph in (named(prefix, seed=len(prefix) + 40), continue_video(segments=1, steps=1, stream_to=prefix)):
        # without stream_to, segments go into no file
        if prefix or "stream" in graph:
            with pytest.raises(ComfyError, match=words):
                comfy.run(graph)
    assert [name for name in names(comfy.output) if name not in before] in ([], ["a"])


def test_a_session_of_another_video_is_kept(comfy):
    folder = comfy.output / "video_sessions"
    for seed in (51, 52):
        comfy.run(build(seconds=0.5, own={}, save="kept", seed=seed))
    assert [name for name in names(folder) if name.startswith("kept")] == ["kept 1.safetensors", "kept.safetensors"]
    first, second = (storage.load(folder / name) for name in ("kept 1.safetensors", "kept.safetensors"))
    assert (first.run.seed, second.run.seed) == (51, 52)
    # one that is continued is replaced
    comfy.run(build(seconds=1.0, own={}, save="kept", load="kept", seed=52))
    assert [name for name in names(folder) if name.startswith("kept")] == ["kept 1.safetensors", "kept.safetensors"]
    assert storage.load(folder / "kept.safetensors").frames_done > second.frames_done
    with pytest.raises(ComfyError, match=r"%date%, which would name another file"):
        comfy.run(build(seconds=0.5, own={}, save="kept %date%"))


@pytest.mark.parametrize("own", [None, {}], ids=["core's sampler", "ours"])
@pytest.mark.parametrize("size", [(88, 64), (96, 72)])
def test_odd_sizes_are_refused_before_the_first_step(comfy, own, size):
    graph = build(seconds=0.5, own=own)
    graph["latent"]["inputs"] |= {"width": size[0], "height": size[1]}
    since = len(comfy.messages)
    with pytest.raises(ComfyError, match=rf"{size[0]} x {size[1]} pixels.*multiples of 16, such as {size[0] // 16 * 16} x 64"):
        comfy.run(graph)
    assert not [message for message in comfy.messages[since:] if message.type == "progress"]


@pytest.mark.parametrize("size", [{"width": 72}, {"height": 40}])
def test_odd_sizes_of_segments_are_refused(comfy, size):
    with pytest.raises(ComfyError, match="does not divide into tokens of 16 x 16"):
        comfy.run(continue_video(segments=1, steps=1, **size))


class Broken:
    """Part of an `ARSampler` that fails where it is told to, and remembers that it was closed."""

    def __init__(self, **failures):
        self.failures, self.calls = failures, []

    def open(self, *_):
        return self._call("open") or self

    def _call(self, name):
        self.calls.append(name)
        if name in self.failures:
            raise self.failures[name]

    def resume(self, video):
        self._call("resume")

    def chunk(self, event, video):
        self._call("chunk")

    def close(self, video):
        self.closed_at = video.shape[2]
        self._call("close")

    def release(self):
        self._call("release")


@pytest.fixture
def ar_run(comfy_modules, tmp_path):
    """Called with the parts of an `ARSampler`: its loop over a real sampler and network. Returns the video."""
    from comfyui_qvg.nodes.long_video import ARSampler, Options, StatusLine
    from comfyui_qvg.qvg.cache.kv_cache import KVCache
    from comfyui_qvg.qvg.settings import PRESETS

    torch.manual_seed(0)
    network = CausalWan(WanSizes(dim=256, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval()
    base = SimpleNamespace(diffusion_model=network, current_patcher=SimpleNamespace(patches={}))

    def run(save, stream, frames=9, callback=None):
        cache = KVCache(PRESETS["balanced"], layers=2, heads=2, head_dim=128, grid=(2, 3), rope=Rope, dtype=torch.float32,
                        max_frames=frames, chunk_frames=3)
        context = network.project_context(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)))
        sampler = Sampler(CachedNetwork(network, [Condition(context, cache)]), Run(frames=frames, sigmas=(1, 0.5, 0)), (1, 16, 4, 6))
        made = ARSampler(Options(save=save, stream=stream))
        return made._run(sampler, base, callback, None, torch.zeros(1, 16, frames, 4, 6), StatusLine(None))

    return run


FULL = OSError(28, "No space left on device")


def test_disks_that_are_full_do_not_end_the_video(ar_run, tmp_path, monkeypatch, caplog):
    """A real session whose every write fails, beside a recorder that fails as well: the video is whole, and both were closed."""
    from comfyui_qvg.nodes.session_saver import SaveTo

    whole = ar_run(None, None)
    broken = Broken(chunk=FULL, close=FULL)
    monkeypatch.setattr(storage, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(FULL))
    assert torch.equal(ar_run(SaveTo(tmp_path / "a.safetensors", 1), broken), whole)
    assert broken.calls == ["open", "chunk", "chunk", "chunk", "close"] and broken.closed_at == 9
    assert list(tmp_path.iterdir()) == [] and "a.safetensors could not be written (No space left on device)" in caplog.text


@pytest.mark.parametrize("failure", [ValueError("a bug"), FULL])
def test_every_recorder_is_closed(ar_run, failure):
    """One fails when it is closed, or before; the other is closed with the whole chunks, all the same."""
    pairs = (Broken(close=failure), Broken()), (Broken(), Broken(close=failure)), (Broken(chunk=failure), Broken(chunk=failure))
    for first, second in pairs:
        try:
            ar_run(first, second)
        except ValueError as error:
            assert error is failure
        assert first.calls[-1] == second.calls[-1] == "close"
        assert first.closed_at == second.closed_at in (3, 9)


def test_an_error_of_a_preview_loses_no_chunk(ar_run, tmp_path):
    """The callback fails in the third chunk: the session holds the two before it."""
    from comfyui_qvg.nodes.session_saver import SaveTo

    def callback(at, *_):
        if at == 4:
            raise ArithmeticError("no preview")

    place = SaveTo(tmp_path / "a.safetensors", 100)
    with pytest.raises(ArithmeticError):
        ar_run(place, None, callback=callback)
    session = storage.load(place.path)
    assert session.frames_done == 6 and torch.equal(session.latents, ar_run(None, None)[:, :, :6])


def test_what_was_opened_is_given_back_where_another_place_cannot_be(ar_run, tmp_path):
    from comfyui_qvg.nodes.session_saver import SaveTo

    place = SaveTo(tmp_path / "a.safetensors", 1)
    with pytest.raises(ValueError, match="no place"):
        ar_run(place, Broken(open=ValueError("no place")))
    assert list(tmp_path.iterdir()) == []
    ar_run(place, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_room_for_a_session_is_looked_at_before_the_first_step(ar_run, tmp_path, monkeypatch):
    import shutil

    from comfyui_qvg.nodes.session_saver import SaveTo

    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1000))
    calls = []
    with pytest.raises(ValueError, match=r"a\.safetensors will take up to .*, but its disk has 1000 B left"):
        ar_run(SaveTo(tmp_path / "a.safetensors", 1), None, callback=lambda *_: calls.append(1))
    assert not calls and list(tmp_path.iterdir()) == []


def test_the_page_fills_in_tokens(page):
    """As for core's own save nodes: what the graph is sent with holds the date and the seed of another node."""
    graph = {"1": {"class_type": "QVGStreamVideo", "inputs": {"filename_prefix": "%date:yyyy%/x"}},
             "2": {"class_type": "SaveVideo", "inputs": {"filename_prefix": "%date:yyyy%/x", "format": "auto", "codec": "auto"}},
             "3": {"class_type": "QVGLongCatContinue", "inputs": {"stream_to": "%date:yyyy%/x"}}}
    page.evaluate("graph => app.loadApiJson(graph, 'names')", graph)
    page.wait_for_timeout(500)
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    values = {node["class_type"]: node["inputs"].get("filename_prefix", node["inputs"].get("stream_to")) for node in sent.values()}
    assert set(values.values()) == {time.strftime("%Y/x")} and len(values) == 3


def test_an_interrupt_within_a_pass_of_the_decoder_waits_for_its_end(comfy_modules):
    """Core checks for it in every layer, and half a pass could not be continued: it comes before the next pass, and no frame is lost."""
    import comfy.model_management
    import comfy.ops
    import comfy.sd

    from comfyui_qvg.nodes.chunk_decoder import CoreDecoder
    from comfyui_qvg.qvg.models.wan_vae import WanVAE

    torch.manual_seed(3)
    vae = comfy.sd.VAE(sd={name: 0.1 * torch.randn_like(tensor) for name, tensor in WanVAE(8).state_dict().items()})
    latents, check = torch.randn(1, 16, 9, 4, 6), comfy.ops.run_every_op
    whole = torch.cat(list(CoreDecoder(vae, vae.patcher)(latents, last=True)), 2)
    decoder, made, stops = CoreDecoder(vae, vae.patcher), [], 0
    hook = vae.first_stage_model.decoder.middle[0].register_forward_hook(
        lambda *_: comfy.model_management.interrupt_current_processing() if not stops else None)
    try:
        for first in (0, 3, 6, 9):
            try:
                for part in decoder(latents[:, :, first:first + 3], last=first == 9):
                    made.append(part)
                    comfy.ops.run_every_op()
            except comfy.model_management.InterruptProcessingException:
                stops += 1
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert stops == 1 and comfy.ops.run_every_op is check
    assert torch.equal(torch.cat(made, 2), whole)


def test_an_interrupt_while_frames_are_decoded_loses_none(comfy_modules, monkeypatch):
    """It comes where ComfyUI looks for it, when models are loaded. What was not decoded comes at the end, equal to an undisturbed decode;
    after a pass that failed itself, nothing wrong comes."""
    import comfy.model_management
    import comfy.sd

    from comfyui_qvg.nodes.chunk_decoder import CoreDecoder
    from comfyui_qvg.qvg.models.wan_vae import WanVAE

    torch.manual_seed(3)
    vae = comfy.sd.VAE(sd={name: 0.1 * torch.randn_like(tensor) for name, tensor in WanVAE(8).state_dict().items()})
    latents = torch.randn(1, 16, 9, 4, 6)

    def decode(fails_at, place, name, failure):
        decoder, calls, made, real = CoreDecoder(vae, vae.patcher), [], [], getattr(place, name)

        def sometimes(*args, **kwargs):
            calls.append(1)
            if len(calls) == fails_at:
                raise failure
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, sometimes)
            for first in (0, 3, 6, 9):
                try:
                    for part in decoder(latents[:, :, first:first + 3], last=first == 9):
                        made.append(part)
                except type(failure):
                    pass
        return torch.cat(made, 2)

    loading = comfy.model_management, "load_models_gpu", comfy.model_management.InterruptProcessingException()
    whole = decode(99, *loading)
    assert whole.shape[2] == 33
    for fails_at in (1, 2, 3, 5):
        assert torch.equal(decode(fails_at, *loading), whole)
    part = decode(3, vae.first_stage_model.decoder.middle[0], "forward", MemoryError())
    assert torch.equal(part, whole[:, :, :part.shape[2]]) and 9 <= part.shape[2] < 33
