"""Thousands of hostile files, see `fuzz`. `python tests/fuzz.py sessions 2000 12000` continues with other seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["sessions", "checkpoints"])
def test_each_opens_right_or_is_refused_with_a_sentence(what):
    """In a process of its own, whose memory is not that of other tests, and which a hang ends."""
    done = subprocess.run([sys.executable, str(FUZZ), what, "0", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"2000 {what}: " in done.stdout and " 0 failures" in done.stdout
