"""Video chunk by chunk: the sampling loop, prompts over time, sessions on disk, frames to and from files.

    from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler

| module | what it does |
|---|---|
| `run`, `events`, `noise` | fields of a run; what the loop reports; noise by seed, chunk and step |
| `network`, `sampler` | a network with its KV caches; the loop over chunks and steps |
| `schedule` | prompts by the clock |
| `decode`, `writer`, `containers`, `reader` | latents to pixels and back; frames to files and back (PyAV) |
| `session`, `session_parts`, `segments`, `segment_file` | what a run needs to continue, on disk |
| `job`, `generate`, `recorder`, `progress` | a whole video without ComfyUI |

What needs PyAV is not imported here.
"""

from .events import Adapted, ChunkDone, Event, StepDone
from .network import CachedNetwork, Condition, Model, check_positions, guided
from .noise import Renoise, flow_renoise
from .run import MAX_FRAMES, SELF_FORCING_SIGMAS, Run
from .sampler import Sampler
from .schedule import PromptTrack, Schedule, first_frame, latent_frames

__all__ = [
    "MAX_FRAMES", "SELF_FORCING_SIGMAS", "Adapted", "CachedNetwork", "ChunkDone", "Condition", "Event", "Model", "PromptTrack", "Renoise",
    "Run", "Sampler", "Schedule", "StepDone", "check_positions", "first_frame", "flow_renoise", "guided", "latent_frames"]
