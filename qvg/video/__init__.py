"""Video chunk by chunk: the sampling loop, prompts over time, sessions on disk, frames to and from files.

    from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler

| module | what it does |
|---|---|
| `run`, `events`, `noise` | fields of a run; what the loop reports; noise by seed, chunk and step |
| `network`, `sampler` | a network with its KV caches; the loop over chunks and steps |
| `schedule` | prompts by the clock |
| `cameras`, `camera_moves`, `camera_file`, `view_memory` | where the camera of a world model is, from keys or a file; what it reads again |
| `decode`, `reader` | latents to pixels and back; image and video files to frames |
| `writer` | frames to a growing file, over `container_file` (`containers`: MP4, WebM), `image_files`, `latent_file` and `written` |
| `session`, `session_parts` | what a run needs to continue, on disk |
| `world`, `walk_session`, `world_forecast` | walks of world models with three memories, on disk, and in bytes |
| `ranks`, `rank_sessions` | one video by several processes; its sessions, for any number of them |
| `sessions` | sessions of a run, whoever makes it |
| `segment_model`, `segments`, `segment_file` | videos in segments (LongCat-Video): in the loop; on disk; their growing file |
| `rank_work`, `crew` | what a process does that takes part in videos; starting such processes by Ray |
| `job`, `prepare`, `generate`, `recorder`, `progress` | a whole video without ComfyUI |
| `walk_job`, `walk_model` | the same of a walk |

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
