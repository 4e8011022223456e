"""World Walk in the real ComfyUI, in the test process itself: tiny random checkpoints of both HY-WorldPlay variants through core's guider,
weights and VAEs, against the same walk in `qvg`."""

from __future__ import annotations

import gc

import av
import pytest
import torch

from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.demo import TEXT_DIM
from comfyui_qvg.qvg.models import HY_WORLDPLAY_5B, HY_WORLDPLAY_8B
from comfyui_qvg.qvg.models.worldplay_schedule import SAMPLING_5B, SAMPLING_8B
from comfyui_qvg.qvg.settings import QVGSettings
from comfyui_qvg.qvg.video import ChunkDone, Run, Sampler
from comfyui_qvg.qvg.video.camera_moves import walk as moves
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_5B, WORLDPLAY_8B
from comfyui_qvg.qvg.video.world import MEMORIES, HunyuanScene, WanScene, WorldCondition, WorldModel, walk_cache
from in_process import causal_model, drawn, world_model, world_vae
from random_models import worldplay_state

PATH = moves("right-13, left-14")  # 28 cameras: turn away, turn back
GRID, OFF = (2, 3), QVGSettings.preset("off")
VARIANTS = {"5b": (HY_WORLDPLAY_5B, WORLDPLAY_5B, SAMPLING_5B, 48, 2), "8b": (HY_WORLDPLAY_8B, WORLDPLAY_8B, SAMPLING_8B, 32, 1)}


@pytest.fixture(scope="module")
def models(comfy_modules):
    return {variant: world_model(variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def vaes(comfy_modules):
    return {variant: world_vae(variant) for variant in VARIANTS}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def prompt(seed, tokens=7, **fields):
    return [[drawn(seed, 1, tokens, TEXT_DIM), fields]]


def image(variant):
    """A start image that is exactly of the size of the video, of whole bytes."""
    side = 16 * VARIANTS[variant][-1]
    return torch.randint(256, (1, side * GRID[0], side * GRID[1], 3), generator=torch.Generator().manual_seed(5)) / 255


def execute(models, vaes, variant, preset=None, model=None, **inputs):
    """(latents, frames, what the node shows)"""
    from comfyui_qvg.nodes.adapters import worldplay
    from comfyui_qvg.nodes.world_walk import QVGWorldWalk

    model, patch = model or models[variant], VARIANTS[variant][-1]
    if preset is not None:
        model = worldplay.quantize(model, QVGSettings.preset(preset))
    inputs = {"positive": prompt(1), "camera_path": PATH, "width": 16 * patch * GRID[1], "height": 16 * patch * GRID[0], "seed": 3,
              "schedule": "distilled", "steps": 2, "cfg": 1.0, "memory": "rebuild", "start_image": image(variant)} | inputs
    made = QVGWorldWalk.execute(model=model, vae=vaes[variant], **inputs)
    images, latent = made.args
    return latent["samples"], images, made.ui["qvg_text"][0]


def qvg_walk(vaes, variant, memory="rebuild", cfg=None, settings=OFF, path=PATH, text=None):
    """The same walk on the same weights, without ComfyUI."""
    family, views, sampling, channels, patch = VARIANTS[variant]
    network = family.open(worldplay_state(variant))
    run = Run(frames=len(path), chunk_frames=4, sigmas=sampling.levels(2, distilled=True), seed=3, solver="euler")
    latent_format = {"5b": "Wan22", "8b": "HunyuanVideo15"}[variant]
    import comfy.latent_formats

    form = getattr(comfy.latent_formats, latent_format)()
    start, conditions = form.process_in(vaes[variant].encode(image(variant))), []
    geometry = Geometry(network.sizes.layers, network.sizes.heads, network.sizes.head_dim, GRID)
    for number, weight in ((1, 1.0),) if cfg is None else ((1, cfg), (2, 1 - cfg)):
        with torch.no_grad():
            projected = text or (network.project_context if variant == "5b" else network.text)(drawn(number, 1, 7, TEXT_DIM))
        scene = {"5b": WanScene, "8b": HunyuanScene}[variant](network, projected, path.actions, start)
        cache = walk_cache(settings, geometry, memory=memory, views=views, frames=len(path), dtype=torch.float32)
        conditions.append(WorldCondition(scene, cache, weight))
    model = WorldModel(conditions, path, memory=memory, views=views, rope=family.rope)
    sampler = Sampler(model, run, (1, channels, patch * GRID[0], patch * GRID[1]))
    return form.process_out(torch.cat([event.latents for event in sampler if isinstance(event, ChunkDone)], 2))


def saving(name, every=1, sampler="euler"):
    """Save Video Session around a SAMPLER."""
    from comfyui_qvg.nodes.session import QVGSaveVideoSession

    return QVGSaveVideoSession.execute(sampler_named(sampler), name, every).args[0]


def sampler_named(name):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def loaded(name):
    """(session, latent, latent frames) of Load Video Session."""
    from comfyui_qvg.nodes.session import QVGLoadVideoSession

    return QVGLoadVideoSession.execute(name).args


@pytest.fixture
def sessions(comfy_modules, tmp_path, monkeypatch):
    """The output folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def decoded(path):
    """Frames of a video file."""
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def interrupt_at(monkeypatch, passes):
    """Stop before a pass of the network over noisy frames; returns the bytes that caches held then."""
    import comfy.model_management

    from comfyui_qvg.nodes.adapters.worldplay_scene import ComfyScene

    held, calls, flow = [], [], ComfyScene.flow

    def stopping(*args):
        calls.append(None)
        if len(calls) == passes:
            held.append(held_bytes())
            comfy.model_management.interrupt_current_processing()
        return flow(*args)

    monkeypatch.setattr(ComfyScene, "flow", stopping)
    return held


def held_bytes():
    """Bytes of all uint8 and int16 tensors alive: codes are kept in no other types, and core has none."""
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype in (torch.uint8, torch.int16))


def near(one, two, tolerance=1e-4):
    return (one - two).abs().max() <= tolerance * two.abs().max()


@pytest.mark.parametrize("memory", MEMORIES)
def test_without_quantizer_a_walk_is_that_of_qvg(models, vaes, variant, memory):
    latents, images, said = execute(models, vaes, variant, memory=memory)
    assert latents.shape[2] == 28 and len(images) == 109 and latents.std() > 0.1
    assert near(latents, qvg_walk(vaes, variant, memory))
    assert said.startswith("28 latent frames, 109 video frames\nchunk 1 reads nothing\nchunk 2 reads latent frames 0-3\n")
    assert said.endswith({"append": "0-23", "rebuild": "0-3, 12-23", "bank": "0-3, 12-23"}[memory]) or variant == "8b"


@pytest.mark.parametrize("memory", MEMORIES)
def test_with_quantizer_a_walk_is_near(models, vaes, variant, memory):
    exact = execute(models, vaes, variant, memory=memory)[0]
    assert torch.equal(execute(models, vaes, variant, "off", memory=memory)[0], exact)
    made = execute(models, vaes, variant, "balanced", memory=memory)[0]
    assert 0 < (made - exact).square().mean() < 0.1 * exact.square().mean()
    assert near(made, qvg_walk(vaes, variant, memory, settings=QVGSettings.preset("balanced")), 1e-2)


def test_guidance_has_a_cache_for_each_prompt(models, vaes, variant):
    latents = execute(models, vaes, variant, "off", cfg=3.0, negative=prompt(2), camera_path=PATH[:12])[0]
    assert near(latents, qvg_walk(vaes, variant, cfg=3.0, path=PATH[:12]), 1e-3)


def test_the_base_schedule_has_the_shift_of_the_model(models, vaes, variant):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from comfyui_qvg.nodes.world_walk import Inputs

    def levels(model, schedule):
        return Inputs(model, [], None, PATH, 0, 0, 0, schedule, 30, 1.0, "rebuild").sigmas

    sampling, shifted = VARIANTS[variant][2], ModelSamplingSD3().patch(models[variant], 3.0)[0]
    assert levels(models[variant], "base") == sampling.levels(30, distilled=False)
    assert levels(shifted, "base") == sampling.levels(30, distilled=False, shift=3.0)
    assert levels(shifted, "distilled") == sampling.levels(30, distilled=True)
    made = execute(models, vaes, variant, schedule="base", steps=3, cfg=2.0, negative=prompt(2), camera_path=PATH[:8])[0]
    assert made.isfinite().all() and not near(made, execute(models, vaes, variant, camera_path=PATH[:8])[0], 1e-2)


def test_frames_are_those_of_one_decode(models, vaes, variant):
    """Those of the 5B come one latent frame at a time, which its VAE does in any case."""
    latents, images, _ = execute(models, vaes, variant, camera_path=PATH[:12])
    assert torch.equal(images, vaes[variant].decode(latents).flatten(0, -4))


def test_the_start_image_is_the_first_frame_of_the_5b(models, vaes):
    latents = execute(models, vaes, "5b", camera_path=PATH[:4])[0]
    assert near(latents[:, :, :1], vaes["5b"].encode(image("5b")))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_walk_goes_on_another_day(models, vaes, variant, memory, sessions):
    """The same walk in two parts ends like the whole, whether the second path is the whole one or what follows."""
    whole = execute(models, vaes, variant, "balanced", memory=memory, camera_path=PATH[:16])[0]
    first = execute(models, vaes, variant, "balanced", memory=memory, camera_path=PATH[:8], sampler=saving("walk"))[0]
    session, latent, frames = loaded("walk")
    assert frames == 8 and torch.equal(latent["samples"], first)
    for path, continues in ((PATH[:16], False), (PATH[7:16], True)):
        made = execute(models, vaes, variant, "balanced", memory=memory, camera_path=path, path_continues=continues, session=session,
                       start_image=None)[0]
        assert near(made, whole, 1e-5)


def test_a_stopped_walk_keeps_its_chunks(models, vaes, variant, sessions, monkeypatch):
    """In the session and in the file; the cache is freed."""
    from comfy.model_management import InterruptProcessingException

    path = PATH[:16]
    whole = execute(models, vaes, variant, "balanced", memory="bank", camera_path=path)[0]
    before = held_bytes()
    with monkeypatch.context() as patch, pytest.raises(InterruptProcessingException):
        during = interrupt_at(patch, 7)  # the first step of the fourth chunk
        execute(models, vaes, variant, "balanced", memory="bank", camera_path=path, sampler=saving("stopped", every=100),
                stream_to="video/stopped")
    assert during and during[0] > before and held_bytes() == before
    session, latent, frames = loaded("stopped")
    assert frames == 12 and torch.equal(latent["samples"], whole[:, :, :12])
    assert decoded(sessions / "video" / "stopped_00001_.mp4") == 45
    made = execute(models, vaes, variant, "balanced", memory="bank", camera_path=path, path_continues=False, session=session)[0]
    assert near(made, whole, 1e-5)


def test_a_walk_is_streamed_as_it_would_be_decoded(models, vaes, variant, sessions):
    latents, images, _ = execute(models, vaes, variant, camera_path=PATH[:16])
    streamed, newest, _ = execute(models, vaes, variant, camera_path=PATH[:16], stream_to="video/walk")
    assert torch.equal(streamed, latents)
    assert decoded(sessions / "video" / "walk_00001_.mp4") == len(images) == 61
    assert len(newest) == 16
    # the VAE of the 8B looks at the whole video at once
    assert (newest - images[-16:]).abs().mean() < (0.01 if variant == "5b" else 0.1)


def test_loras_change_the_walk(models, vaes, variant):
    """A LoRA in the published names, through core's own loader: as if it were part of the weights."""
    import comfy.sd

    from comfyui_qvg.nodes.adapters import worldplay_5b, worldplay_8b

    name, published = {"5b": ("blocks.1.self_attn.o_prope", "blocks.1.attn1.to_out_prope.0"),
                       "8b": ("double_blocks.1.img.q", "double_blocks.1.img_attn_q")}[variant]
    state = worldplay_state(variant)
    up, down = drawn(1, state[f"{name}.weight"].shape[0], 2), drawn(2, 2, state[f"{name}.weight"].shape[1])
    lora = {f"diffusion_model.{published}.lora_B.weight": up, f"diffusion_model.{published}.lora_A.weight": down}
    patched = comfy.sd.load_lora_for_models(models[variant], None, lora, 0.5, 0.0)[0]
    assert len(patched.patches) == 1
    state[f"{name}.weight"] = state[f"{name}.weight"] + 0.5 * up @ down
    merged = {"5b": worldplay_5b, "8b": worldplay_8b}[variant].load(state)
    plain = execute(models, vaes, variant, camera_path=PATH[:12])[0]
    made = execute(models, vaes, variant, model=patched, camera_path=PATH[:12])[0]
    assert near(made, execute(models, vaes, variant, model=merged, camera_path=PATH[:12])[0], 1e-3) and not near(made, plain, 1e-2)
    # the weights are put back
    assert torch.equal(execute(models, vaes, variant, camera_path=PATH[:12])[0], plain)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_fp8_weights(models, vaes, variant, compute, monkeypatch):
    """Bulk weights of 8 bits, computed in another type; what is around the blocks keeps 16."""
    import comfy.model_management

    from comfyui_qvg.nodes.adapters import worldplay_5b, worldplay_8b

    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: compute)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in worldplay_state(variant).items()}
    small = {"5b": worldplay_5b, "8b": worldplay_8b}[variant].load(state, dtype=torch.float8_e4m3fn)
    assert small.model.get_dtype_inference() == compute
    made = execute(models, vaes, variant, "balanced", model=small, camera_path=PATH[:12])[0]
    exact = execute(models, vaes, variant, camera_path=PATH[:12])[0]
    assert made.isfinite().all() and (made - exact).square().mean() < 0.1 * exact.square().mean()


def test_what_the_8b_is_told_besides_the_prompt(models, vaes):
    """Quoted words, an image as CLIP Vision sees it, and a mask reach the text side as `qvg` has it."""
    from types import SimpleNamespace

    seen, glyphs, mask = drawn(7, 1, 5, 20), drawn(8, 1, 4, 12), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    positive = prompt(1, conditioning_byt5small=glyphs, attention_mask=mask)
    made = execute(models, vaes, "8b", positive=positive, camera_path=PATH[:8],
                   clip_vision_output=SimpleNamespace(last_hidden_state=seen))[0]
    network = HY_WORLDPLAY_8B.open(worldplay_state("8b"))
    with torch.no_grad():
        text = network.text(drawn(1, 1, 7, TEXT_DIM), mask, glyphs=glyphs, image=seen)
    assert near(made, qvg_walk(vaes, "8b", path=PATH[:8], text=text))
    assert not near(made, qvg_walk(vaes, "8b", path=PATH[:8]), 1e-2)


def test_bad_inputs_are_refused_in_one_sentence(models, vaes, comfy_modules):
    for variant, match, inputs in (
            ("5b", "CausalWanModel does not follow a camera path. Load HY-WorldPlay", {"model": causal_model()}),
            ("5b", "no camera path", {"camera_path": None}),
            ("5b", "begins with an image", {"start_image": None}),
            ("5b", r"of 80 x 64 pixels; .* multiples of 32. Set them to 64 x 64, or to 0 for 1280 x 704", {"width": 80}),
            ("8b", r"multiples of 16. Set them to 48 x 32, or to 0 for 832 x 480", {"width": 50}),
            ("5b", "latents of 32 channels, but HY-WorldPlay 5B needs 48. Load the VAE of Wan 2.2", {"vae": "8b"}),
            ("8b", "latents of 48 channels, but HY-WorldPlay 8B needs 32. Load the VAE of HunyuanVideo 1.5", {"vae": "5b"}),
            ("5b", "cfg is 5, for which a negative prompt is needed", {"cfg": 5.0}),
            ("5b", "2 conditions are combined in positive", {"positive": prompt(1) + prompt(2)}),
            ("5b", "takes no image from CLIP Vision", {"clip_vision_output": object()}),
            ("5b", "Euler steps, but the SAMPLER is dpmpp_2m", {"sampler": sampler_named("dpmpp_2m")})):
        swapped = dict(vaes, **{variant: vaes[inputs.pop("vae")]}) if "vae" in inputs else vaes
        with pytest.raises(ValueError, match=match) as refused:
            execute(models, swapped, variant, **inputs)
        assert "\n" not in str(refused.value)


def test_sessions_that_do_not_fit_are_refused(models, vaes, sessions, comfy_modules):
    from comfyui_qvg.nodes.long_video import QVGARVideoSampler
    from comfyui_qvg.nodes.session_kinds import KINDS

    execute(models, vaes, "5b", camera_path=PATH[:8], sampler=saving("short"))
    session = loaded("short")[0]
    other = world_model("5b", seed=9)
    for match, inputs in (
            ("has 4 latent frames, but short.safetensors holds 8 already", {"camera_path": PATH[:4], "path_continues": False}),
            (r"one camera, where short.safetensors ends", {"camera_path": PATH[:1]}),
            ("does not begin with the 8 latent frames", {"camera_path": moves("left-20"), "path_continues": False}),
            ("saved with another model", {"model": other}),
            ("saved with the memory 'rebuild'", {"memory": "bank"}),
            ("does not begin with the image", {"start_image": 1 - image("5b")}),
            ("holds 1 caches, but this run has 2 prompts", {"cfg": 2.0, "negative": prompt(2)}),
            ("begins with an image whose latents have the shape", {"width": 96 + 32, "start_image": None})):
        with pytest.raises(ValueError, match=match):
            execute(models, vaes, "5b", session=session, **inputs)
    with pytest.raises(ValueError, match=r"short\.safetensors is a video of HY-WorldPlay. Connect it to World Walk"):
        QVGARVideoSampler.execute(3, session=session)
    causal = object.__new__(next(iter(KINDS)))
    causal.path = session.path
    with pytest.raises(ValueError, match=r"is a video of a causal model. Connect it to AR Video Sampler"):
        execute(models, vaes, "5b", session=causal)


def test_other_samplers_are_told_where_to_go(models):
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(1, 48, 4, 4, 6)
    with pytest.raises(ValueError, match="Connect the MODEL to World Walk"):
        comfy.sample.sample_custom(models["5b"], latent, 1.0, comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.0]), prompt(1),
                                   prompt(2), latent, disable_pbar=True, seed=0)


def test_a_cache_that_exceeds_the_device_is_refused(models, vaes, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 500_000)
    with pytest.raises(ValueError, match=r"of a walk of 28 latent frames needs .* in all\. Choose the preset .*the memory rebuild"):
        execute(models, vaes, "5b", "off", memory="append")


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("preset", ["off", "balanced"])
def test_the_forecast_is_what_a_walk_takes(models, vaes, variant, memory, preset):
    from comfyui_qvg.nodes.adapters import worldplay
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    model = worldplay.quantize(models[variant], QVGSettings.preset(preset))
    execute(models, vaes, variant, model=model, memory=memory, cfg=2.0, negative=prompt(2))
    log = model.get_attachment(ATTACHMENT)
    now, found = log.run.history[-1], log.run.forecast
    assert len(log.run.history) == 7 and now.workspace_bytes == found.workspace_bytes
    # bases of random tokens do not fit those of later chunks, so that more of them are kept than in the usual case
    exact = preset == "off" or memory == "rebuild"
    for name in ("stored_bytes", "peak_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(now, name), rel=0.02 if exact else 0.3)


def test_a_network_of_this_layout_with_the_latents_of_wan21(comfy_modules, sessions):
    """Such as a small one that is trained for a demonstration: latent format, VAE, sizes and sessions follow from its 16 channels."""
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils

    from comfyui_qvg.nodes.adapters import worldplay_5b
    from comfyui_qvg.qvg.demo import VAE_PATH

    model, vae = worldplay_5b.load(worldplay_state("5b", channels=16)), comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_PATH)))
    assert isinstance(model.model.latent_format, comfy.latent_formats.Wan21)
    picture = torch.randint(256, (1, 32, 48, 3), generator=torch.Generator().manual_seed(5)) / 255
    inputs = {"model": model, "width": 48, "height": 32, "start_image": picture, "memory": "bank"}
    latents, images, said = execute({}, {"5b": vae}, "5b", **inputs, sampler=saving("small"))
    assert latents.shape == (1, 16, len(PATH), 4, 6) and images.shape == (4 * len(PATH) - 3, 32, 48, 3)
    torch.testing.assert_close(latents[:, :, :1], vae.encode(picture), rtol=0, atol=1e-4)
    assert "28 latent frames, 109 video frames" in said
    _, kept, frames = loaded("small")
    assert frames == len(PATH)
    torch.testing.assert_close(kept["samples"], latents, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"needs 16. Load the VAE of Wan 2.1."):
        execute({}, {"5b": world_vae("5b")}, "5b", **inputs)
