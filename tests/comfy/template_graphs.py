"""The templates of workflows/ as data: what `write_templates.py` builds in the real frontend, and what tests expect to find.

A `Template` is a graph in API format plus what the user sees of it: groups from left to right, titles, notes, and the files
that it needs with their addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from comfyui_qvg.qvg.demo import HEIGHT, NETWORK_FILE, PROMPTS, VAE_FILE, WIDTH
from comfyui_qvg.qvg.demo.world import WORLD_FILE, WORLD_VAE_FILE
from comfyui_qvg.qvg.demo.world_scenes import PACE
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.report.plan import plan
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_5B as VIEWS_5B
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_8B as VIEWS_8B
from comfyui_qvg.qvg.video.world_forecast import forecast_walk

WAN = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
TEXT_ENCODER = ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", f"{WAN}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders")
VAE = ("wan_2.1_vae.safetensors", f"{WAN}/vae/wan_2.1_vae.safetensors", "vae")
SELF_FORCING = ("self_forcing_dmd.pt", "https://huggingface.co/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt",
                "diffusion_models")
# both of its authors' files are called causal_forcing.pt, so the frame-wise one comes from the author of core's support
CAUSAL_FORCING = ("causal_forcing.pt", "https://huggingface.co/zhuhz22/Causal-Forcing/resolve/main/chunkwise/causal_forcing.pt",
                  "diffusion_models")
LONGCAT = ("LongCat_TI2V_comfy_fp8_e4m3fn_scaled_KJ.safetensors",
           "https://huggingface.co/Kijai/LongCat-Video_comfy/resolve/main/LongCat_TI2V_comfy_fp8_e4m3fn_scaled_KJ.safetensors",
           "diffusion_models")
LONGCAT_LORA = ("cfg_step_lora.safetensors", "https://huggingface.co/meituan-longcat/LongCat-Video/resolve/main/lora/cfg_step_lora.safetensors",
                "loras")
CAUSAL_FORCING_FRAMES = (
    "causal_forcing-framewise.safetensors",
    "https://huggingface.co/TalmajM/causal_forcing_framewise_ComfyUI_repackaged/resolve/main/split_files/diffusion_models/"
    "causal_forcing-framewise.safetensors", "diffusion_models")

WORLDPLAY = "https://huggingface.co/tencent/HY-WorldPlay/resolve/main"
HUNYUAN = "https://huggingface.co/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
WORLDPLAY_5B = ("model.pt", f"{WORLDPLAY}/wan_distilled_model/model.pt", "diffusion_models")
WORLDPLAY_8B = ("model.safetensors", f"{WORLDPLAY}/ar_distilled_action_model/model.safetensors", "diffusion_models")
WAN22_VAE = ("wan2.2_vae.safetensors", "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/"
             "wan2.2_vae.safetensors", "vae")
HUNYUAN_VAE = ("hunyuanvideo15_vae_fp16.safetensors", f"{HUNYUAN}/vae/hunyuanvideo15_vae_fp16.safetensors", "vae")
QWEN = ("qwen_2.5_vl_7b_fp8_scaled.safetensors", f"{HUNYUAN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders")
BYT5 = ("byt5_small_glyphxl_fp16.safetensors", f"{HUNYUAN}/text_encoders/byt5_small_glyphxl_fp16.safetensors", "text_encoders")
SIGLIP = ("sigclip_vision_patch14_384.safetensors",
          "https://huggingface.co/Comfy-Org/sigclip_vision_384/resolve/main/sigclip_vision_patch14_384.safetensors", "clip_vision")
VIEWS = {"hy-worldplay-5b": VIEWS_5B, "hy-worldplay-8b": VIEWS_8B}
# name, address, folder below models
File = tuple[str, str, str]


@dataclass
class Group:
    """A titled box; `nodes` are ids of the graph from top to bottom, or notes as ("title", "markdown")."""

    title: str
    nodes: list
    width: int = 340


@dataclass
class Template:
    """graph: API format. files: node id -> the file or files that it loads. heights: of nodes that show text or pictures. runs: on a fresh
    ComfyUI. bars: what the thumbnail of a model too large to run says that it shows, and what `qvg plan` is asked for it."""

    name: str
    graph: dict = field(default_factory=dict)
    columns: list[list[Group]] = field(default_factory=list)
    files: dict[str, File | list[File]] = field(default_factory=dict)
    heights: dict[str, int] = field(default_factory=dict)
    runs: bool = False
    bars: tuple[str, dict] | None = None

    def files_of(self, node: str) -> list[File]:
        files = self.files.get(node, [])
        return files if isinstance(files, list) else [files]

    @property
    def downloads(self) -> list[File]:
        return [file for node in self.files for file in self.files_of(node)]

    def add(self, node: str, kind: str, /, **inputs) -> list:
        self.graph[node] = {"class_type": kind, "inputs": inputs}
        return [node, 0]


def _sampling(template: Template, model, conditioning, latent, vae, block: int, prefix: str) -> None:
    """From a quantized model to a saved video and the monitor."""
    noise = template.add("noise", "RandomNoise", noise_seed=0, control_after_generate="fixed")
    guider = template.add("guider", "BasicGuider", model=model, conditioning=conditioning)
    sampler = template.add("sampler", "SamplerARVideo", num_frame_per_block=block)
    sigmas = template.add("sigmas", "BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0)
    samples = template.add("sample", "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                           latent_image=latent)
    images = template.add("decode", "VAEDecode", samples=samples, vae=vae)
    video = template.add("video", "CreateVideo", images=images, fps=16.0)
    template.add("save", "SaveVideo", video=video, filename_prefix=f"video/{prefix}", format="auto", codec="auto")
    template.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=samples)
    template.heights |= {"quantize": 150, "save": 430, "monitor": 560}


def _quantize(template: Template, model) -> list:
    settings = template.add("settings", "QVGSettings", preset="Balanced")
    return template.add("quantize", "QVGQuantizeKVCache", model=model, settings=settings)


def _finish(template: Template, load: list, describe: list, note: tuple[str, str]) -> Template:
    template.columns = [
        [Group("Read me", [note], 360)],
        [Group("1  Load", load, 380), Group("2  Quantize the KV cache", ["settings", "quantize"], 380)],
        [Group("3  Describe", describe, 380)],
        [Group("4  Sample", ["noise", "guider", "sampler", "sigmas", "sample"], 320)],
        [Group("5  Video", ["decode", "video", "save"], 460)],
        [Group("6  What the cache held", ["monitor"], 560)]]
    return template


TINY_NOTE = """\
The tiny model comes with the pack (16 MB, trained on drawn scenes), so there is nothing to download. It shows what the nodes do, not \
what a large model can do.

- **QVG Settings**: set the preset to Off and run again for the same video from the model's own cache.
- **length**: make it longer and watch the monitor. A basis is as large as that of a large model, but a frame has a sixteenth of \
its tokens, so the cache shrinks less than there.
- The model knows few words; hover over the prompt to see them."""


def tiny(image: bool) -> Template:
    template = Template("Tiny model - image to video" if image else "Tiny model - text to video", runs=True)
    frames = 46 if image else 45
    model = template.add("load", "UNETLoader", unet_name=NETWORK_FILE, weight_dtype="default")
    vae = template.add("vae", "VAELoader", vae_name=VAE_FILE)
    prompt = template.add("prompt", "QVGDemoPrompt", text=PROMPTS[6 if image else 0], seed=18)
    size = {"width": WIDTH, "height": HEIGHT, "length": 4 * frames - 3, "batch_size": 1}
    model = _quantize(template, model)
    describe = ["prompt"]
    if image:
        model = template.add("start", "ARVideoI2V", model=model, vae=vae, start_image=["prompt", 1], **size)
        latent = ["start", 1]
        template.add("picture", "PreviewImage", images=["prompt", 1])
        describe += ["picture", "start"]
    else:
        latent = template.add("latent", "EmptyARVideoLatent", **size)
        describe += ["latent"]
    template.heights |= {"prompt": 170, "picture": 260}
    _sampling(template, model, prompt, latent, vae, 3, "qvg_tiny")
    return _finish(template, ["load", "vae"], describe, ("Nothing to download", TINY_NOTE))


def _memory_note(model: str, files: list[File]) -> str:
    lines = ["Put these files into ComfyUI/models:", ""]
    lines += [f"- {folder}/ [{name}]({url})" for name, url, folder in files]
    lines += ["", "KV cache at 832 x 480, from `qvg plan` (peak, workspace included):", "",
              "| video | bf16 | Quality | Balanced | Smallest | Tiny |", "|---|---|---|---|---|---|"]
    for seconds in (5, 15, 30, 60):
        presets = plan(model, seconds=seconds)["presets"]
        cells = [presets["off"]["bf16_bytes"], *(presets[name]["peak_bytes"] for name in ("quality", "balanced", "smallest", "tiny"))]
        lines.append(f"| {seconds} s | " + " | ".join(f"{cell / GIB:.1f} GiB" for cell in cells) + " |")
    lines += ["", "**length** counts video frames, 16 per second: 81 frames are 5 s. cfg is always 1. The model was trained on 5 s; longer "
              "videos work but drift in colour and content, whatever the cache holds."]
    return "\n".join(lines)


PROMPT = (
    "A corgi runs along a wet beach at sunrise, ears flapping, paws splashing through shallow water. Low camera at the dog's height "
    "follows from the side. Golden light glitters on the waves, soft haze over the sea, sand flies behind the dog. Cinematic, sharp, "
    "shallow depth of field.")


def published(title: str, model: str, file: File, block: int, image: bool) -> Template:
    template = Template(f"{title} - {'image' if image else 'text'} to video")
    template.files = {"load": file, "clip": TEXT_ENCODER, "vae": VAE}
    template.bars = "KV cache of one minute", {"model": model, "seconds": 60}
    network = template.add("load", "QVGLoadARVideoModel", model_name=file[0], weight_dtype="default")
    clip = template.add("clip", "CLIPLoader", clip_name=TEXT_ENCODER[0], type="wan", device="default")
    vae = template.add("vae", "VAELoader", vae_name=VAE[0])
    prompt = template.add("prompt", "CLIPTextEncode", text=PROMPT, clip=clip)
    # a start image is a chunk of its own, before whole ones
    frames = 22 if image and block == 3 else 21
    size = {"width": 832, "height": 480, "length": 4 * frames - 3, "batch_size": 1}
    network = _quantize(template, network)
    describe = ["prompt"]
    if image:
        picture = template.add("picture", "LoadImage", image="example.png")
        network = template.add("start", "ARVideoI2V", model=network, vae=vae, start_image=picture, **size)
        latent = ["start", 1]
        describe += ["picture", "start"]
    else:
        latent = template.add("latent", "EmptyARVideoLatent", **size)
        describe += ["latent"]
    template.heights |= {"prompt": 200, "picture": 370}
    _sampling(template, network, prompt, latent, vae, block, f"qvg_{model.replace('-', '_')}")
    note = _memory_note(model, [file, TEXT_ENCODER, VAE])
    return _finish(template, ["load", "clip", "vae"], describe, ("Files and memory", note))


LONGCAT_PROMPT = (
    "realistic filming style, a potter in a clay-stained apron shapes a tall vase on a turning wheel. Wet hands press the rim and draw the "
    "wall upwards, water runs over the fingers. A sunlit workshop, shelves of unglazed bowls behind, dust in the light of a large window. "
    "The camera slowly circles the wheel at table height.")
LONGCAT_NEGATIVE = (
    "overexposed, static, blurred details, subtitles, painting, still picture, overall gray, worst quality, low quality, JPEG artefacts, "
    "ugly, deformed, extra fingers, fused fingers, messy background")


def _longcat_note(lora: bool, files: list[File]) -> str:
    lines = ["Put these files into ComfyUI/models:", ""]
    lines += [f"- {folder}/ [{name}]({url})" for name, url, folder in files]
    lines += ["", "The bf16 file on the same page and the authors' own files also work.", "",
              "KV cache at 832 x 480, from `qvg plan` (peak, workspace included):", "",
              "| given_frames | bf16 | Quality | Balanced | Smallest | Tiny |", "|---|---|---|---|---|---|"]
    for frames in (1, 4, 9, 19):
        presets = plan("longcat", latent_frames=frames)["presets"]
        cells = [presets["off"]["bf16_bytes"], *(presets[name]["peak_bytes"] for name in ("quality", "balanced", "smallest", "tiny"))]
        lines.append(f"| {4 * frames - 3} | " + " | ".join(f"{cell / GIB:.1f} GiB" for cell in cells) + " |")
    lines += ["", "A segment has 93 frames, at 15 per second. Each one after the first continues **given_frames** of the one before: more "
              "keep the video more consistent, but the same length then takes more segments."]
    lines += ["", "With the distillation LoRA: 16 steps, cfg 1, schedule distilled." if lora else
              "Without a LoRA: 50 steps, cfg 4, schedule base. With cfg_step_lora: 16 steps, cfg 1, schedule distilled."]
    return "\n".join(lines)


def longcat(use: str, *, image: bool = False, segments: int = 1, given_frames: int = 13, lora: bool = False) -> Template:
    template = Template(f"LongCat-Video - {use}", bars=("KV cache of 73 given frames", {"model": "longcat", "latent_frames": 19}))
    template.files = {"load": LONGCAT, "clip": TEXT_ENCODER, "vae": VAE}
    network = template.add("load", "QVGLoadARVideoModel", model_name=LONGCAT[0], weight_dtype="default")
    clip = template.add("clip", "CLIPLoader", clip_name=TEXT_ENCODER[0], type="wan", device="default")
    vae = template.add("vae", "VAELoader", vae_name=VAE[0])
    load = ["load", "clip", "vae"]
    if lora:
        network = template.add("lora", "LoraLoaderModelOnly", model=network, lora_name=LONGCAT_LORA[0], strength_model=1.0)
        template.files["lora"] = LONGCAT_LORA
        load.append("lora")
    network = _quantize(template, network)
    positive = template.add("positive", "CLIPTextEncode", text=LONGCAT_PROMPT, clip=clip)
    describe, start = ["positive"], {}
    if lora:
        # at cfg 1 the negative prompt is not asked
        negative = positive
    else:
        negative = template.add("negative", "CLIPTextEncode", text=LONGCAT_NEGATIVE, clip=clip)
        describe.append("negative")
    if image:
        start = {"start": template.add("picture", "LoadImage", image="example.png")}
        describe.append("picture")
    sample = ["continue"]
    if segments > 1:
        sampler = template.add("sampler", "KSamplerSelect", sampler_name="euler")
        start["sampler"] = template.add("keep", "QVGSaveVideoSession", sampler=sampler, name="longcat", every_chunks=1)
        sample = ["sampler", "keep", "continue"]
    sampling = {"steps": 16, "cfg": 1.0, "schedule": "distilled"} if lora else {"steps": 50, "cfg": 4.0, "schedule": "base"}
    template.add(
        "continue", "QVGLongCatContinue", model=network, positive=positive, negative=negative, vae=vae, width=832, height=480, length=93,
        given_frames=given_frames, segments=segments, seed=0, control_after_generate="fixed", **sampling, **start)
    video = template.add("video", "CreateVideo", images=["continue", 0], fps=15.0)
    template.add("save", "SaveVideo", video=video, filename_prefix="video/qvg_longcat", format="auto", codec="auto")
    template.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["continue", 1])
    template.heights |= {"positive": 200, "negative": 160, "picture": 370, "quantize": 150, "save": 430, "monitor": 560}
    note = _longcat_note(lora, template.downloads)
    if segments == 1 and not image:
        note += "\n\nA single segment from text needs no cache. Raise **segments** for a longer video."
    if segments > 1:
        note += ("\n\n**Save Video Session (QVG)** saves every segment. After a crash or an interrupt, or to make the video longer, "
                 "connect *Load Video Session (QVG)* to **session**.")
    template.columns = [
        [Group("Read me", [("Files and memory", note)], 360)],
        [Group("1  Load", load, 380), Group("2  Quantize the KV cache", ["settings", "quantize"], 380)],
        [Group("3  Describe", describe, 380)],
        [Group("4  Sample", sample, 340)],
        [Group("5  Video", ["video", "save"], 460)],
        [Group("6  What the cache held", ["monitor"], 560)]]
    return template


LONG_NOTE = """\
**AR Video Sampler (QVG)** makes video of any length, chunk by chunk.

- **Stream Video to File (QVG)** writes it while it is made: open the file below output/video and watch it grow.
- **Save Video Session (QVG)** saves every few chunks. To continue after a crash, an interrupt, or later, use *Load Video Session (QVG)*.
- Interrupt whenever you like: what is finished is decoded and saved.
- Each prompt begins at its own time. **recache_frames** lets a new one take effect immediately."""
LONG_WINDOW = """\

The model was trained on 21 latent frames. With **window_frames** 12, the 3 sink frames and **position_limit** 21 it never sees more, so \
memory and time per chunk do not grow with the video's length."""
LONG_PROMPTS = (
    "0s: A corgi runs along a wet beach at sunrise, ears flapping, paws splashing through shallow water. Golden light, cinematic, sharp.\n"
    "10s: The corgi stops, shakes the water out of its fur and looks out to sea. Golden light, cinematic, sharp.\n"
    "20s: The corgi digs a hole in the wet sand, sand flies behind it. Golden light, cinematic, sharp.")
SESSION = "corgi"


def long_video(use: str) -> Template:
    """use: "prompt schedule" or "resume" or "continue a video" with Self-Forcing, or "tiny" for the model that comes along."""
    tiny = use == "tiny"
    template = Template("Tiny model - long video with two prompts" if tiny else f"Self-Forcing - {use}", runs=tiny)
    if tiny:
        network = template.add("load", "UNETLoader", unet_name=NETWORK_FILE, weight_dtype="default")
        vae = template.add("vae", "VAELoader", vae_name=VAE_FILE)
        load, width, height, seconds = ["load", "vae"], WIDTH, HEIGHT, 12.0
        first = template.add("prompt", "QVGDemoPrompt", text=PROMPTS[0], seed=18)
        second = template.add("prompt2", "QVGDemoPrompt", text=PROMPTS[3], seed=18)
        prompt = template.add("at", "QVGPromptAt", conditioning=first, next=second, seconds=6.0, frame_rate=16)
        describe = ["prompt", "prompt2", "at"]
        template.heights |= {"prompt": 170, "prompt2": 170}
    else:
        template.files = {"load": SELF_FORCING, "clip": TEXT_ENCODER, "vae": VAE}
        template.bars = "KV cache of one minute", {"model": "self-forcing", "seconds": 60}
        network = template.add("load", "QVGLoadARVideoModel", model_name=SELF_FORCING[0], weight_dtype="default")
        clip = template.add("clip", "CLIPLoader", clip_name=TEXT_ENCODER[0], type="wan", device="default")
        vae = template.add("vae", "VAELoader", vae_name=VAE[0])
        load, width, height, seconds = ["load", "clip", "vae"], 832, 480, 60.0 if use == "resume" else 30.0
        prompt = template.add("prompt", "QVGPromptSchedule", clip=clip, text=LONG_PROMPTS, frame_rate=16)
        describe = ["prompt"]
        template.heights |= {"prompt": 330}
    settings = template.add("settings", "QVGSettings", preset="Balanced", window_frames=-1 if tiny else 12)
    network = template.add("quantize", "QVGQuantizeKVCache", model=network, settings=settings)
    latent = template.add("latent", "QVGEmptyLongVideoLatent", seconds=seconds, frame_rate=16, width=width, height=height, batch_size=1)
    describe.append("latent")
    inputs = {}
    if use == "resume":
        inputs["session"] = template.add("session", "QVGLoadVideoSession", name=SESSION)
        describe.append("session")
    if use == "continue a video":
        template.add("file", "LoadVideo", file="clip.mp4")
        template.add("parts", "GetVideoComponents", video=["file", 0])
        scaled = template.add("scale", "ImageScale", image=["parts", 0], upscale_method="bilinear", width=width, height=height,
                              crop="center")
        inputs["start"] = template.add("encode", "VAEEncode", pixels=scaled, vae=vae)
        describe += ["file", "parts", "scale", "encode"]
    sampler = template.add("sampler", "QVGARVideoSampler", chunk_frames=3, recache_frames=9, position_limit=0 if tiny else 21, **inputs)
    sampler = template.add("keep", "QVGSaveVideoSession", sampler=sampler, name="tiny" if tiny else SESSION, every_chunks=4)
    sampler = template.add("stream", "QVGStreamVideo", sampler=sampler, vae=vae, filename_prefix="video/qvg_stream", format="MP4 (H.264)",
                           frame_rate=16)
    noise = template.add("noise", "RandomNoise", noise_seed=0, control_after_generate="fixed")
    guider = template.add("guider", "BasicGuider", model=network, conditioning=prompt)
    sigmas = template.add("sigmas", "BasicScheduler", model=network, scheduler="simple", steps=4, denoise=1.0)
    samples = template.add("sample", "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                           latent_image=latent)
    images = template.add("decode", "VAEDecode", samples=samples, vae=vae)
    video = template.add("video", "CreateVideo", images=images, fps=16.0)
    template.add("save", "SaveVideo", video=video, filename_prefix="video/qvg_long", format="auto", codec="auto")
    template.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=samples)
    template.heights |= {"quantize": 150, "save": 430, "monitor": 560}
    note = LONG_NOTE if tiny else LONG_NOTE + LONG_WINDOW + "\n\n" + _memory_note("self-forcing", template.downloads)
    template.columns = [
        [Group("Read me", [("Long video", note)], 360)],
        [Group("1  Load", load, 380), Group("2  Quantize the KV cache", ["settings", "quantize"], 380)],
        [Group("3  Describe", describe, 380)],
        [Group("4  Sample", ["sampler", "keep", "stream"], 360)],
        [Group("5  Run", ["noise", "guider", "sigmas", "sample"], 320)],
        [Group("6  Video", ["decode", "video", "save"], 460)],
        [Group("7  What the cache held", ["monitor"], 560)]]
    return template


WORLD_PROMPT = (
    "A gentle green hill under a wide blue sky with a few white clouds. A girl with large yellow fox ears and a pink dress stands on the "
    "grass with open arms. Drawn in flat, bright colours, a calm summer day.")
WORLD_LICENCE = (
    "**Licence**: the weights of HY-WorldPlay are under the Tencent HY-WorldPlay Community License, which grants no rights in the European "
    "Union, the United Kingdom and South Korea. Read it on [their page](https://huggingface.co/tencent/HY-WorldPlay) first.")
WORLD_NOTE = """\
**Camera Path (QVG)** says where the camera goes; run it alone to see the path from above. This one turns away and comes back, so that \
what was seen before is seen again. Every latent frame more is four video frames.

**memory** of *World Walk* is what a chunk of four latent frames remembers:

- *rebuild*: the newest frames and those that saw the same place, computed anew for each chunk, as HY-WorldPlay does.
- *append*: everything, as it was computed first.
- *bank*: everything is kept, and those that saw the same place are read.

With a start image of your own, describe the place that it shows, not the movement."""


def _walk_bytes(model: str, memory: str, frames: int, preset: str) -> float:
    """GiB at the peak of a walk's cache; preset "" is bf16."""
    found = forecast_walk(PRESETS[preset or "off"], MODELS[model].geometry(), memory=memory, views=VIEWS[model], frames=frames)
    return (found.peak_bytes if preset else found.bf16_bytes) / GIB


def _walk_note(model: str, files: list[File]) -> str:
    width, height = MODELS[model].size
    lines = [WORLD_LICENCE, "", "Put these files into ComfyUI/models:", ""]
    lines += [f"- {folder}/ [{name}]({url})" for name, url, folder in files]
    lines += ["", f"{files[0][0]} is a name of many models: keep it in a folder of its own, or rename it, and choose it in the loader.", "",
              f"KV cache of a walk at {width} x {height} (forecast of the peak, workspace included):", "",
              "| latent frames | memory | bf16 | Quality | Balanced | Smallest | Tiny |", "|---|---|---|---|---|---|---|"]
    for memory, frames, length in (("rebuild", 128, "any"), ("append", 128, "128"), ("bank", 128, "128")):
        cells = [_walk_bytes(model, memory, frames, preset) for preset in ("", "quality", "balanced", "smallest", "tiny")]
        lines.append(f"| {length} | {memory} | " + " | ".join(f"{cell:.1f} GiB" for cell in cells) + " |")
    return "\n".join([*lines, "", WORLD_NOTE])


def world_walk(model: str) -> Template:
    """model: "hy-worldplay-5b" or "hy-worldplay-8b"."""
    large = model == "hy-worldplay-8b"
    template = Template(f"HY-WorldPlay {'8B' if large else '5B'} - image to world walk")
    template.bars = "KV cache of 128 latent frames", {"model": model, "latent_frames": 128}
    file, vae_file = (WORLDPLAY_8B, HUNYUAN_VAE) if large else (WORLDPLAY_5B, WAN22_VAE)
    template.files = {"load": file, "clip": [QWEN, BYT5] if large else TEXT_ENCODER, "vae": vae_file}
    network = template.add("load", "QVGLoadARVideoModel", model_name=file[0], weight_dtype="default")
    clip = (template.add("clip", "DualCLIPLoader", clip_name1=QWEN[0], clip_name2=BYT5[0], type="hunyuan_video_15", device="default")
            if large else template.add("clip", "CLIPLoader", clip_name=TEXT_ENCODER[0], type="wan", device="default"))
    vae = template.add("vae", "VAELoader", vae_name=vae_file[0])
    load = ["load", "clip", "vae"]
    network = _quantize(template, network)
    image = template.add("picture", "LoadImage", image="example.png")
    prompt = template.add("prompt", "CLIPTextEncode", text=WORLD_PROMPT, clip=clip)
    describe, seen = ["picture", "prompt"], {}
    if large:
        template.files["vision"] = SIGLIP
        vision = template.add("vision", "CLIPVisionLoader", clip_name=SIGLIP[0])
        seen["clip_vision_output"] = template.add("see", "CLIPVisionEncode", clip_vision=vision, image=image, crop="center")
        load.append("vision")
        describe.append("see")
    path = template.add("path", "QVGCameraPath", source="moves", moves="w-8, right-15, left-15, s-9", frames=0)
    walk = template.add("walk", "QVGWorldWalk", model=network, positive=prompt, vae=vae, camera_path=path, width=0, height=0, seed=0,
                        control_after_generate="fixed", schedule="distilled", steps=4, cfg=1.0, memory="rebuild", start_image=image, **seen)
    video = template.add("video", "CreateVideo", images=walk, fps=24.0 if large else 16.0)
    template.add("save", "SaveVideo", video=video, filename_prefix="video/qvg_walk", format="auto", codec="auto")
    template.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["walk", 1])
    template.heights |= {"prompt": 180, "picture": 370, "path": 720, "quantize": 150, "save": 430, "monitor": 560}
    template.columns = [
        [Group("Read me", [("Licence, files and memory", _walk_note(model, template.downloads))], 400)],
        [Group("1  Load", load, 380), Group("2  Quantize the KV cache", ["settings", "quantize"], 380)],
        [Group("3  Describe", describe, 380)],
        [Group("4  Where the camera goes", ["path"], 400)],
        [Group("5  Walk", ["walk"], 360)],
        [Group("6  Video", ["video", "save"], 460)],
        [Group("7  What the cache held", ["monitor"], 560)]]
    return template


TINY_WALK_NOTE = """\
The tiny world model comes with the pack (6 MB, trained on drawn rooms), so there is nothing to download. It shows whether a walk \
remembers, not what a large model can do.

The camera turns away and comes back. The model gets one picture of the room and invents the rest, so the walls that come into view \
differ from the real ones: that is no fault. **Look at the way back.** Does a picture that it invented come again as it was? Is the \
first wall at the end the one of the beginning?

- The **video** has the real room on the left and the walk on the right.
- The **chart** compares the two: high at first, low where the model invents, and high again at the end if it remembers.

What to change:

- **QVG Settings**: Off is the exact cache, Tiny the smallest one.
- **memory** of *World Walk*: rebuild, bank or append; hover over it to see what they do.
- To see it **forget**: set memory to append, and in *QVG Settings*, under the advanced settings, window_frames to 4 and sink_frames to \
0. Then it sees only the newest four latent frames, and the wall at the end is another one.
- **seed** of *Tiny Room*: another room. **moves** of *Camera Path*: another walk; keep **turn** at 9 and **step** at 0.15, which the \
model was trained with."""


def tiny_walk() -> Template:
    template = Template("Tiny model - world walk", runs=True)
    network = template.add("load", "QVGLoadARVideoModel", model_name=WORLD_FILE, weight_dtype="default")
    vae = template.add("vae", "VAELoader", vae_name=WORLD_VAE_FILE)
    network = _quantize(template, network)
    path = template.add("path", "QVGCameraPath", source="moves", moves="right-18, left-18, still-3", frames=0, step=PACE.step,
                        turn=PACE.turn)
    start = template.add("room", "QVGTinyRoom", seed=0, camera_path=path)
    walk = template.add("walk", "QVGWorldWalk", model=network, positive=["room", 2], vae=vae, camera_path=path, width=0, height=0, seed=0,
                        control_after_generate="fixed", schedule="distilled", steps=4, cfg=1.0, memory="rebuild", start_image=start)
    both = template.add("compare", "QVGCompare", first=["room", 1], second=walk)
    template.add("chart", "PreviewImage", images=["compare", 2])
    video = template.add("video", "CreateVideo", images=both, fps=16.0)
    template.add("save", "SaveVideo", video=video, filename_prefix="video/qvg_tiny_walk", format="auto", codec="auto")
    template.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["walk", 1])
    template.heights |= {"path": 720, "walk": 640, "quantize": 150, "chart": 330, "save": 300, "monitor": 560}
    template.columns = [
        [Group("Read me", [("Does the walk remember?", TINY_WALK_NOTE)], 400)],
        [Group("1  Load", ["load", "vae"], 380), Group("2  Quantize the KV cache", ["settings", "quantize"], 380)],
        [Group("3  Where the camera goes", ["path"], 400)],
        [Group("4  A room, and a walk in it", ["room", "walk"], 360)],
        [Group("5  The real room and the walk", ["compare", "chart", "video", "save"], 520)],
        [Group("6  What the cache held", ["monitor"], 560)]]
    return template


TEMPLATES = {template.name: template for template in (
    tiny(image=False), tiny(image=True),
    published("Self-Forcing", "self-forcing", SELF_FORCING, 3, image=False),
    published("Self-Forcing", "self-forcing", SELF_FORCING, 3, image=True),
    published("Causal-Forcing", "causal-forcing", CAUSAL_FORCING, 3, image=False),
    published("Causal-Forcing", "causal-forcing", CAUSAL_FORCING_FRAMES, 1, image=True),
    longcat("text to video"), longcat("image to video", image=True),
    longcat("long video", segments=8, given_frames=33, lora=True),
    long_video("tiny"), long_video("prompt schedule"), long_video("resume"), long_video("continue a video"),
    tiny_walk(), world_walk("hy-worldplay-5b"), world_walk("hy-worldplay-8b"))}
FIRST = "Tiny model - text to video"  # what the README lets people run first
