"""The real ComfyUI as a subprocess, with this repository as its only custom node pack.

    with ComfyServer(tmp_path) as server:
        server.client.run(prompt)

A server gets a base directory of its own (models, input, output, user, custom_nodes), so nothing is read from or
written to the ComfyUI of the person who runs the tests; the repository is a link in its custom_nodes. It runs on a
free port of 127.0.0.1, on the CPU, with one thread: on a small shared machine two threads are slower and erratic.
With QVG_TEST_GPU=1 in the environment it runs on the GPUs, as ComfyUI does by itself (test_split_gpus needs two).
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
from contextlib import suppress
from pathlib import Path
from random import SystemRandom

from comfy_client import ComfyClient
from comfy_paths import REPOSITORY, SHIMS, find_comfyui

PACK = "ComfyUI-QuantVideoGen"
START_SECONDS = 600  # 15 on two idle cores
# how ComfyUI's loader words what it does not load
LOADER_COMPLAINTS = ("Cannot import", "IMPORT FAILED", "Error while calling", "not callable", "did not return", "Skip ")


class ComfyServer:
    """A running server between `start()` and `stop()`; `base` keeps its files, `client` talks to it.

    flags: further command line arguments of main.py, for example "--preview-method", "latent2rgb".
    pack: the folder that is linked as the pack; name: what custom_nodes calls it.
    """

    def __init__(self, base: Path, *flags: str, comfyui: Path | None = None, pack: Path = REPOSITORY, name: str = PACK):
        self.pack, self.name = pack, name
        self.base = Path(base)
        self.comfyui = comfyui or find_comfyui()
        self.flags = flags
        self.client: ComfyClient | None = None
        self.process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        """Everything that the server wrote, colours removed."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.base / "server.log").read_text(errors="replace"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def folder(self, *parts: str) -> Path:
        """A folder below the base directory, made if it is not there: folder("models", "vae"), folder("output")."""
        path = self.base.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def start(self) -> ComfyServer:
        link = self.folder("custom_nodes") / self.name
        if not link.is_symlink():
            link.symlink_to(self.pack, target_is_directory=True)
        # someone who is not here for the first time, to whom the frontend opens no dialog
        (self.folder("user", "default") / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
        self.port = free_port()
        path = os.pathsep.join(filter(None, [str(SHIMS), os.environ.get("PYTHONPATH")]))
        with open(self.base / "server.log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.comfyui / "main.py"), *self._arguments()],
                cwd=self.base,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            self._wait_until_ready()
            # read here: later entries may be refusals that a test provoked on purpose
            self.complaints_at_start = self.complaints()
            self.client = ComfyClient(self.url, self.folder("output"))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the process, its last resort a kill; the base directory stays."""
        if self.client is not None:
            self.client.close()
            self.client = None
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    def rss(self) -> int:
        """Resident memory of the server process in bytes (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def complaints(self) -> list[str]:
        """What the log says against the pack: tracebacks through its files, and the loader's own refusals."""
        lines = self.log.splitlines()
        found = [line for line in lines if self.name in line and any(words in line for words in LOADER_COMPLAINTS)]
        for start, line in enumerate(lines):
            if "Traceback (most recent call last)" in line:
                end = start + 1
                while end < len(lines) and lines[end].startswith(" "):
                    end += 1
                found.append("\n".join(lines[start : end + 1]))
        return [text for text in found if self.name in text]

    def _arguments(self) -> list[str]:
        return [
            *(() if os.environ.get("QVG_TEST_GPU") == "1" else ("--cpu",)),
            *("--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base)),
            *("--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", *self.flags),
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with status {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                ComfyClient.get(self.url + "/system_stats", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise TimeoutError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log[-4000:]}")


def free_port() -> int:
    """Below those that systems give to whoever asks for any, and above those of Ray's workers: ComfyUI listens seconds later, and until
    then another process could get it."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
