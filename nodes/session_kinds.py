"""Which node continues a session."""

from __future__ import annotations

from ..qvg.video.segments import SegmentSession
from ..qvg.video.session import Session
from ..qvg.video.walk_session import WalkSession

# kind -> (what made it, the node that continues it)
KINDS = {Session: ("a causal model", "AR Video Sampler (QVG)"), SegmentSession: ("LongCat-Video", "Continue Video (LongCat, QVG)"),
         WalkSession: ("HY-WorldPlay", "World Walk (HY-WorldPlay, QVG)")}


def check_kind(session, kind: type) -> None:
    """Raises ValueError for a session of another kind, which names the node that it belongs to. None is no session."""
    if session is not None and not isinstance(session, kind):
        made_by, node = KINDS[type(session)]
        raise ValueError(f"{session.path.name} is a video of {made_by}. Connect it to {node}.")
