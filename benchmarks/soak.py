"""Long runs on a CPU: memory that stays flat, and runs that are killed at random moments and resumed.

    python -m comfyui_qvg.benchmarks.soak flat --chunks 2000
    python -m comfyui_qvg.benchmarks.soak kill --times 50

`flat` makes a video with a window and a budget, decodes and encodes every chunk, and reads the process's resident memory after each.
`kill` makes a video in a process that is killed (SIGKILL) at random times and resumed until the video is complete, and compares file and
session with those of an uninterrupted run. Both print JSON, and exit with a non-zero status if a claim fails.

--model tiny is the trained tiny model; small is a random network of two layers over 16 x 32 pixels, for tests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import av
import torch

from ..qvg.commands.results import prepare_folder
from ..qvg.models.wan import CausalWan, WanSizes
from ..qvg.models.wan_vae import WanVAE
from ..qvg.units import GIB
from ..qvg.video import ChunkDone, Run, Schedule
from ..qvg.video import session as storage
from ..qvg.video.generate import generate
from ..qvg.video.job import Job, resumed
from .measure import progress
from .planes import PLANES

MEBI = 1 << 20
TINY_PROMPTS = "0s: red circle moving right, over green dots still\n20s: blue star still, over yellow waves still"


def small_model():
    torch.manual_seed(0)
    network = CausalWan(WanSizes(dim=256, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval()

    def embed(text: str):
        return torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(sum(text.encode())))

    return network, WanVAE(4).requires_grad_(False).eval(), embed, (2, 4)


def tiny_model():
    from ..qvg.demo import LATENT, embed_prompt, load_tiny

    return *load_tiny(), embed_prompt, LATENT


MODELS = {"small": small_model, "tiny": tiny_model}


def job(folder: Path, latent: tuple[int, int], chunks: int, steps: int, budget_mib: float, checkpoint: int = 4) -> Job:
    # of frames as small as these, bases take more than the budget
    settings = replace(PLANES["balanced"].both(centroids=32), window_frames=12, budget_gib=budget_mib * MEBI / GIB)
    sigmas = (1.0, 0.9375, 5 / 6, 0.625, 0.0) if steps == 4 else tuple(1 - step / steps for step in range(steps)) + (0.0,)
    return Job(out=folder / "video.mp4", session=folder / "video.session.safetensors", schedule=Schedule.parse(TINY_PROMPTS),
               run=Run(frames=3 * chunks, sigmas=sigmas, recache_frames=6), settings=settings, latent=latent, checkpoint=checkpoint)


def resident_bytes() -> int:
    """Resident memory of this process, without file mappings and without what the allocator keeps of freed memory."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # without this, glibc's free lists make the figure vary by 2 %
        trim(0)
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


def frames_in(path: Path) -> int:
    """Number of frames that can be decoded."""
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def flat(model: str, chunks: int, steps: int, budget_mib: float, settled: int) -> dict:
    """Bytes of resident memory after chunk `settled` and at the end, the cache's peak, and the frames in the file."""
    network, vae, embed, latent = MODELS[model]()
    began, resident, most = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        todo = job(Path(folder), latent, chunks, steps, budget_mib, checkpoint=50)
        for event, _ in generate(network, vae, embed, todo):
            if isinstance(event, ChunkDone):
                resident.append(resident_bytes())
                most = max(most, event.stats.peak_bytes)
                if len(resident) % 100 == 0:
                    progress(f"{len(resident)} chunks, {resident[-1]} resident bytes, {time.monotonic() - began:.0f} s")
        frames = frames_in(todo.out)
    # memory fluctuates with the allocator, so medians of many chunks are compared
    width = max(1, (chunks - settled) // 10)
    before, after = (sorted(part)[len(part) // 2] for part in (resident[settled:settled + width], resident[-width:]))
    return {"model": model, "chunks": chunks, "steps": steps, "torch": torch.__version__, "seconds": round(time.monotonic() - began, 1),
            "resident_before": before, "resident_after": after, "growth_percent": 100 * (after / before - 1), "cache_peak": most,
            "budget": int(budget_mib * MEBI), "frames": frames, "expected_frames": 12 * chunks - 3}


def work(model: str, folder: Path, chunks: int, steps: int) -> None:
    """One process of `kill`: start, or continue where the previous one was killed."""
    network, vae, embed, latent = MODELS[model]()
    # a run that was killed before its first checkpoint starts over
    todo, session = replace(job(folder, latent, chunks, steps, 64), overwrite=True), None
    if todo.session.is_file():
        session = storage.load(todo.session)
        todo = resumed(session, todo.out)
    print("begun", flush=True)
    for _ in generate(network, vae, embed, todo, resume=session):
        pass


def kill(model: str, chunks: int, steps: int, times: int, seed: int) -> dict:
    """Kill a run `times` times, then let it finish, and compare the result with that of an uninterrupted run."""
    draw, killed, unreadable, orphans, began = random.Random(seed), 0, 0, [], time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        folders = [Path(top) / name for name in ("whole", "killed")]
        for folder in folders:
            folder.mkdir()
        start = time.monotonic()
        subprocess.run(_command(model, folders[0], chunks, steps), check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - start
        results = []
        while killed < times or not results:
            process = subprocess.Popen(_command(model, folders[1], chunks, steps), stdout=subprocess.PIPE)
            process.stdout.readline()
            try:
                process.wait(timeout=draw.uniform(0, length / 3) if killed < times else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                unreadable += not _readable(folders[1])
            else:
                results.append(_result(folders[1]))
                orphans += sorted({path.name for path in folders[1].iterdir()} - {path.name for path in folders[0].iterdir()})
                for file in folders[1].iterdir():
                    file.unlink()
        equal = all(result == _result(folders[0]) for result in results)
    return {"model": model, "chunks": chunks, "steps": steps, "torch": torch.__version__, "killed": killed,
            "finished_runs": len(results), "equal": equal, "unreadable_files": unreadable, "orphans": orphans,
            "seconds": round(time.monotonic() - began, 1)}


def _command(model: str, folder: Path, chunks: int, steps: int) -> list[str]:
    return [sys.executable, "-m", __spec__.name if __spec__ else __name__, "work", "--overwrite", "--model", model, "--folder",
            str(folder), "--chunks", str(chunks), "--steps", str(steps)]


def _readable(folder: Path) -> bool:
    """Whether the files of the killed run can be read: the session, and in the video at least the frames that the session records."""
    session, video = folder / "video.session.safetensors", folder / "video.mp4"
    if not session.is_file():
        return True
    return frames_in(video) >= storage.load(session).extra["video_frames"]


def _result(folder: Path) -> tuple:
    """The bytes of the finished video, and every tensor of the last session."""
    session = storage.load(folder / "video.session.safetensors")
    tensors = {name: (str(tensor.dtype), tuple(tensor.shape), bytes(storage._bytes(tensor))) for name, tensor in session.stored.items()}
    return (folder / "video.mp4").read_bytes(), tensors, session.frames_done, session.chunk, session.last_prompt


def main(options: list[str] | None = None) -> int:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("what", choices=("flat", "kill", "work"))
    root.add_argument("--model", choices=MODELS, default="tiny")
    root.add_argument("--chunks", type=int)
    root.add_argument("--steps", type=int, default=4)
    root.add_argument("--times", type=int, default=50)
    root.add_argument("--seed", type=int, default=0)
    root.add_argument("--budget", type=float, default=4, metavar="MIB")
    root.add_argument("--settled", type=int, default=200, help="chunks after which memory has to be flat")
    root.add_argument("--folder", type=Path, help="of work: where the video and the session go")
    root.add_argument("--overwrite", action="store_true", help="of work: continue or replace what is in the folder")
    chosen = root.parse_args(options)
    torch.set_num_threads(1)
    if chosen.what == "work":
        if chosen.folder is None:
            root.error("work needs a --folder")
        prepare_folder(chosen.folder, ("video.mp4", "video.session.safetensors"), chosen.overwrite)
        work(chosen.model, chosen.folder, chosen.chunks or 30, chosen.steps)
        return 0
    if chosen.what == "flat":
        found = flat(chosen.model, chosen.chunks or 2000, chosen.steps, chosen.budget, chosen.settled)
        good = found["growth_percent"] < 1 and found["cache_peak"] <= found["budget"] and found["frames"] == found["expected_frames"]
    else:
        found = kill(chosen.model, chosen.chunks or 30, chosen.steps, chosen.times, chosen.seed)
        good = found["equal"] and not found["unreadable_files"] and not found["orphans"]
    print(json.dumps(found | {"cpu": os.uname().machine, "good": good}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
