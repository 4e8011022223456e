"""The other ranks of a video, which Ray starts: one process a GPU, this one being the first rank.

    crew = Crew(2, "cuda:0")
    with crew.video(plan, network) as ranks:
        with Leader(plan.model(network, ranks, device), ranks) as leader: ...
    crew.stop()

Ray starts and watches processes, and nothing else: what ranks tell each other goes through torch.distributed (`rank_work`). A Ray that
somebody else started in this process is used and left as it was. The processes end with `stop`, with this process however it ends, and
where they could be waiting for something that will not come.

On one machine nothing listens beyond it. This is the only module that imports Ray or writes environment variables: NCCL and Gloo are told
in no other way to stay on the loopback interface, and Ray to send no statistics.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..attention.ranks import Ranks
from ..files import first_line
from .rank_plans import NetworkPlan
from .rank_work import Meeting, abandon, joined, tell_plan
from .ranks import RankEnded

PACK = __package__.rpartition(".qvg.")[0]
ROOT = Path(__file__).resolve().parents[2]
# folders of the pack that a machine of a cluster does not need
NOT_SENT = [".git", "benchmarks", "docs", "locales", "subgraphs", "tests", "web", "workflows"]
LOOPBACK = "127.0.0.1"
# bytes; nothing is put there, and Ray refuses less
OBJECT_STORE = 80 << 20
# how Ray behaves in this process: it tells nobody, kills no rank where other programs fill the memory, and waits until it knows why one
# ended (milliseconds), where a busy machine needs more than a second
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_timeout_ms_task_wait_for_death_info": "10000"}
# and does not look minutes for a cluster that is not there (seconds). A Ray that is started here is not told: its processes would give up
# as early while they wait for each other
JOIN = {"RAY_gcs_server_port_wait_time_s": "1", "RAY_py_gcs_connect_timeout_s": "5"}
# seconds
TO_START, TO_ANSWER, TO_PART = 180, 120, 20

NO_RAY = "To split over GPUs, ComfyUI's Python needs Ray. Install it there with `pip install ray`, and restart ComfyUI."
GONE = "another node pack ended Ray"
ENDED = ("A process that makes a share of this video ended ({reason}). Finished chunks are in its session, if one is saved, from which the "
         "video can be continued. The next run starts the processes anew.")


def load_ray():
    """The module. Raises ValueError with the command that installs it."""
    try:
        import ray
    except ImportError:
        raise ValueError(NO_RAY) from None
    return ray


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Inside, environment variables have these values, unless somebody has set them."""
    names = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _loopback() -> dict[str, str]:
    """Variables that keep Gloo and NCCL on the loopback interface, where the user has not chosen another."""
    interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    names = [] if interface is None else ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    return {name: interface for name in names if name not in os.environ}


def _started_with(env: dict[str, str]) -> dict:
    """A runtime_env of Ray for processes on this machine."""
    # Ray 2.60 quotes a worker's arguments for the shell, but not its Python, which never starts where its path has a space
    quoted = {} if sys.platform == "win32" else {"py_executable": shlex.quote(sys.executable)}
    return {"env_vars": env, **quoted}


def _connect(ray, address: str, folder: str) -> bool:
    """Start Ray on this machine, or join the cluster at `address`. False where this process has one already.

    Raises ValueError where that is another cluster, and where there is none.
    """
    if ray.is_initialized():
        present = ray.get_runtime_context().gcs_address
        if address not in ("", "auto", present):
            raise ValueError(f"This process is connected to the Ray at {present} already, so it cannot join {address}. Give that address, "
                             "or restart ComfyUI.")
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "quantvideogen"}
    if not address:
        _start_here(ray, folder, **quiet)
        return True
    try:
        ray.init(address=address, runtime_env={"working_dir": str(ROOT), "excludes": NOT_SENT}, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"There is no Ray cluster at {address} ({first_line(error)}). Start it with `ray start --head`, let this "
                         "machine join it, and give host:port; if it asks for a token, start ComfyUI with RAY_AUTH_MODE=token. Or leave "
                         "the address empty to use this machine alone.") from None
    return True


def _start_here(ray, folder: str, **quiet) -> None:
    services = ray._private.services
    resolve = services.resolve_ip_for_localhost
    # Ray would take the address that this machine has in its network, and listen there
    services.resolve_ip_for_localhost = lambda host: host
    try:
        ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, object_store_memory=OBJECT_STORE, _temp_dir=folder,
                 _node_ip_address=LOOPBACK, **quiet)
    finally:
        services.resolve_ip_for_localhost = resolve
    if ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(f"Ray {ray.__version__} would listen beyond this machine. Install another version of it.")


def _process():
    """The class of a process that Ray starts. It is sent by value: only afterwards can the other process import the pack."""
    class Process:
        def __init__(self, name: str, root: str, device: str):
            import importlib
            import sys
            import types
            from pathlib import Path

            pack = types.ModuleType(name)
            pack.__path__ = [root or str(Path.cwd())]
            sys.modules[name] = pack
            self.follower = importlib.import_module(f"{name}.qvg.video.rank_work").Follower(device)

        def gpu(self) -> str:
            import torch

            return str(torch.cuda.get_device_properties(self.follower.device).uuid)

        def prepare(self, weights: str):
            return self.follower.prepare(weights)

        def take_part(self, meeting, rank: int) -> None:
            self.follower.take_part(meeting, rank)

    return Process


class Crew:
    """Processes for all ranks but the first.

    size: of ranks, 0 for all GPUs. device: of this process; on the CPU there is one process for each rank. address: of a Ray cluster that
    this machine belongs to, "" for this machine alone.
    Raises ValueError where Ray, the cluster or enough GPUs are missing, and RuntimeError where the processes do not start.
    """

    def __init__(self, size: int, device: str, address: str = ""):
        self.device, self.address, self._watch = torch.device(device), address, None
        if dist.is_initialized():
            raise ValueError("Something else in this process already uses torch.distributed, so a video cannot be split over GPUs here. "
                             "Remove the node pack that does.")
        if self.on_gpu and not dist.is_nccl_available():
            raise ValueError("This torch has no NCCL, through which GPUs exchange their shares. Use torch for Linux with CUDA or ROCm.")
        folder = tempfile.mkdtemp(prefix="qvg-")
        self._meetings, self._folder = count(), folder
        try:
            # some of them are read by the import, and others later
            with _environment(**RAY, **JOIN):
                self.ray = load_ray()
            with _environment(**RAY, **(JOIN if address else {})):
                own = _connect(self.ray, address, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # a cluster gets the pack when it is joined; elsewhere the pack lies where it lies here
        self._root = "" if own and address else str(ROOT)
        self._present, self._actors = self.ray.get_runtime_context().gcs_address, []
        self._end = weakref.finalize(self, _end, self.ray, self._actors, self._present, own, folder)
        try:
            self.size = size or self._all()
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def stopped(self) -> bool:
        return not self._end.alive

    def stop(self) -> None:
        """End the processes, and Ray where this class started it."""
        self._end()

    def _all(self) -> int:
        """As many ranks as there are GPUs. That of this process is none of a cluster's."""
        return 1 + int(self.ray.cluster_resources().get("GPU", 0)) if self.address else torch.cuda.device_count()

    def _start(self) -> None:
        ray, kind = self.ray, self.ray.remote(_process())
        for options, device in self._places():
            self._actors.append(kind.options(num_cpus=0, **options).remote(PACK, self._root, device))
        try:
            # the constructor has run when a method answers
            self._ask("prepare", "", seconds=TO_START)
            if self.on_gpu:
                self._check_gpus(self._ask("gpu"))
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(f"Ray did not start the processes of {self.size - 1} more GPUs within {TO_START} seconds: "
                               f"{self._missing()}") from None
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray could not start the other ranks ({_reason(error)}). Check that the same torch is installed "
                               "everywhere.") from None

    def _missing(self) -> str:
        if self.address and self.on_gpu:
            return f"{int(self.ray.available_resources().get('GPU', 0))} GPUs of the cluster are free. Free more, or choose fewer GPUs."
        return f"the machine is busy, or Ray cannot run {sys.executable} there. Let other programs end, or choose fewer GPUs."

    def _places(self) -> list[tuple[dict, str]]:
        """For each other rank, options of its process, and the name of its device there."""
        if self.address:
            return [({"num_gpus": int(self.on_gpu)}, "cuda:0" if self.on_gpu else "cpu")] * (self.size - 1)
        # Ray knows nothing of the GPU of this process, and would give it to another rank
        env = _loopback() | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        if not self.on_gpu:
            return [({"runtime_env": _started_with(env)}, "cpu")] * (self.size - 1)
        own = torch.cuda.current_device() if self.device.index is None else self.device.index
        others = [index for index in range(torch.cuda.device_count()) if index != own][:self.size - 1]
        if len(others) < self.size - 1:
            raise ValueError(f"The video is to be split over {self.size} GPUs, but {len(others) + 1} are visible. Choose at most as many.")
        if torch.version.hip:
            return [({"runtime_env": _started_with(env)}, f"cuda:{index}") for index in others]
        named = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in others]
        return [({"runtime_env": _started_with(env | {"CUDA_VISIBLE_DEVICES": name})}, "cuda:0") for name in named]

    def _check_gpus(self, found: list[str]) -> None:
        """Raises ValueError where two ranks have one GPU."""
        found = [str(torch.cuda.get_device_properties(self.device).uuid), *found]
        if len({*found}) < len(found):
            raise ValueError("Ray gave a GPU to two ranks, or the one that ComfyUI uses. Start Ray on ComfyUI's machine with "
                             "CUDA_VISIBLE_DEVICES set to the other GPUs.")

    def _ask(self, name: str, *arguments, seconds: float = TO_ANSWER) -> list:
        if not _is_there(self.ray, self._present):
            raise RankEnded(GONE)
        return self.ray.get([getattr(actor, name).remote(*arguments) for actor in self._actors], timeout=seconds)

    def prepare(self, weights: str) -> tuple[bool, int]:
        """Whether all ranks have these weights, and the free bytes on the device that has fewest; others are dropped.

        Raises RankEnded where a process has ended; the crew is then stopped.
        """
        try:
            found = self._ask("prepare", weights)
        except Exception as error:
            self.stop()
            raise RankEnded(ENDED.format(reason=_reason(error))) from error
        return all(has for has, _ in found), min(free for _, free in found)

    @contextmanager
    def video(self, plan: NetworkPlan, network: nn.Module) -> Iterator[Ranks]:
        """The ranks of one video, which are told its plan, and the weights of `network` where one lacks them.

        The processes stay for another video if all of them ended with the block, also after an error; otherwise the crew is stopped.
        Raises RankEnded where a process ended.
        """
        has, _ = self.prepare(plan.weights)
        meeting, store = self._meeting()
        watch = None
        try:
            with _environment(**({} if self.address else _loopback())):
                tasks = [actor.take_part.remote(meeting, rank) for rank, actor in enumerate(self._actors, 1)]
                self._watch = watch = Watch(self.ray, self._present, tasks, self.on_gpu)
                with joined(meeting, 0, str(self.device), store) as ranks:
                    tell_plan(plan, network, ranks, weights=not has)
                    yield ranks
            watch.part()
        except BaseException as error:
            lost = isinstance(error, RankEnded) or (watch is not None and watch.early)
            reason = "it was not started" if watch is None else watch.part()
            if reason:
                self.stop()
            if reason and lost:
                raise RankEnded(ENDED.format(reason=reason)) from error
            raise
        finally:
            self._watch = None
            if watch is not None:
                watch.close()

    def check(self) -> None:
        """Raises RankEnded where a process has ended during a video: what a GPU then computed is worth nothing."""
        if self._watch is not None and self._watch.early:
            raise RankEnded(ENDED.format(reason=self._watch.early))

    def _meeting(self) -> tuple[Meeting, dist.Store]:
        if self.address:
            host = self.ray.util.get_node_ip_address()
            store = dist.TCPStore(host, 0, self.size, is_master=True, wait_for_workers=False)
            return Meeting((host, store.port), self.size), store
        meeting = Meeting(str(Path(self._folder, f"meeting{next(self._meetings)}")), self.size)
        return meeting, meeting.store(True)


class Watch:
    """Notices when another rank ends before the video does.

    tasks: what they do, of the Ray at the address `present`. on_gpu: the first rank waits on a GPU.
    """

    def __init__(self, ray, present: str, tasks: list, on_gpu: bool):
        self.ray, self.present, self.tasks, self.on_gpu = ray, present, tasks, on_gpu
        self.early = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qvg ranks", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._ended(1)[0] and not self._over.is_set():
                # without a reason, where the first rank has told it to
                self.early = self._why()
                if self.early and self.on_gpu:
                    # a collective would wait for its timeout
                    abandon()
                return

    def _ended(self, seconds: float, number: int = 1) -> tuple[list, list]:
        """The tasks that ended, once they are so many or the seconds are over, and the others."""
        return self.ray.wait(self.tasks, num_returns=number, timeout=seconds) if _is_there(self.ray, self.present) else (self.tasks, [])

    def _why(self) -> str:
        """Why ranks ended that have, "" where nothing was wrong. A process that is gone says more than those that missed it."""
        if not _is_there(self.ray, self.present):
            return GONE
        reasons = []
        for task in self._ended(0, len(self.tasks))[0]:
            try:
                self.ray.get(task)
            except Exception as error:
                reasons.append((isinstance(getattr(error, "cause", None), RankEnded), _reason(error)))
        return min(reasons, default=(False, ""))[1]

    def part(self) -> str:
        """Let the other ranks end; why one did not, or not well, "" if all did."""
        self._over.set()
        waiting = self._ended(TO_PART, len(self.tasks))[1]
        return self.early or self._why() or ("it did not answer" if waiting else "")

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def _reason(error: BaseException) -> str:
    """In a few words, why a process ended or did not answer."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return first_line(cause)
    kind = type(error).__name__
    return {"ActorDiedError": "it was killed or crashed", "ActorUnavailableError": "it does not answer",
            "GetTimeoutError": "it does not answer"}.get(kind, f"{kind}: {first_line(error)}")


def _is_there(ray, present: str) -> bool:
    """Whether this process still has the Ray at the address `present`. Another pack may have ended it, and Ray would start a new one for
    whoever asks it something."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == present


def _end(ray, actors: list, present: str, own: bool, folder: str) -> None:
    """present: the address of the Ray of a crew. own: the crew started or joined it."""
    if _is_there(ray, present):
        for actor in actors:
            with suppress(Exception):
                ray.kill(actor)
        if own:
            ray.shutdown()
    actors.clear()
    shutil.rmtree(folder, ignore_errors=True)
