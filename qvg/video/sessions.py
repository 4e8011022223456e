"""Sessions of a run that one process makes, or the first of several ranks: who asks for one need not know which.

    save(path, sampler, fingerprint=...)
    restore(session, sampler, fingerprint)
"""

from __future__ import annotations

from pathlib import Path

from ..attention.ranks import Ranks
from . import rank_sessions, walk_session
from . import session as storage
from .ranks import Leader
from .sampler import Sampler
from .segments import SegmentSession
from .session import Session
from .walk_session import WalkSession


def ranks_of(sampler: Sampler) -> Ranks | None:
    """Those that make the run of a sampler, of which this process is the first; None where it makes the run alone."""
    return sampler.model.ranks if isinstance(sampler.model, Leader) else None


def save(path: str | Path, sampler: Sampler, **more) -> None:
    """See `session.save`."""
    ranks = ranks_of(sampler)
    if ranks is None:
        storage.save(path, sampler, **more)
    else:
        rank_sessions.save(path, sampler, ranks=ranks, **more)


def save_walk(path: str | Path, sampler: Sampler, **more) -> None:
    """See `walk_session.save`."""
    ranks = ranks_of(sampler)
    if ranks is None:
        walk_session.save(path, sampler, **more)
    else:
        rank_sessions.save_walk(path, sampler, ranks=ranks, **more)


def restore(session: Session | WalkSession | SegmentSession, sampler: Sampler, fingerprint: str) -> None:
    """Move an unused sampler, on all ranks, to the position of a session. Raises SessionError where it cannot continue there."""
    ranks = ranks_of(sampler)
    if ranks is None:
        session.restore(sampler, fingerprint)
    else:
        rank_sessions.restore(session, sampler, ranks, fingerprint)
