"""Places on disk: refused with a sentence before anything is made, held by one writer, and whole whatever happens."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from comfyui_qvg.qvg.files import InUse, Lock, PlaceError, check_place, remove_parts, write_atomically
from comfyui_qvg.qvg.files import places as files

HOLD = ("import sys, time; from comfyui_qvg.qvg.files import Lock\n"
        "lock = Lock(sys.argv[1]); print('held', flush=True); time.sleep(60)")


@pytest.mark.parametrize(("name", "words"), [
    ("a:b.mp4", "has a ':'"), ("NUL", "for a device"), ("con.mp4", "for a device"), ("COM1.tar.gz", "for a device"), ("a\n.mp4", "control"),
    ("a\0.mp4", "control"), ("a.mp4 ", "ends with a space"), ("a.", "ends with a dot"), ("x" * 250 + ".mp4", "too long"),
    ("y" * 300, "too long"), ("nowhere/a.mp4", "no folder"), ("folder", "is a folder"), ("file/a.mp4", "no folder")])
def test_places_that_cannot_be_written(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=words) as refused:
        check_place(tmp_path / name)
    assert repr(name.rpartition("/")[2])[1:-1][:40] in str(refused.value), "the sentence names the path"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("name", ["a.mp4", "icon.mp4", "com10.mp4", "kälte %.mp4", "x" * 236 + ".mp4", "-", ".hidden"])
def test_places_that_can(tmp_path, name):
    check_place(tmp_path / name)
    write_atomically(tmp_path / name, lambda place: place.write_text("whole"))
    assert (tmp_path / name).read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_room_on_the_disk(tmp_path):
    check_place(tmp_path / "a", 1000)
    with pytest.raises(PlaceError, match=r"/a will take up to 1024\.0 TiB, but its disk has"):
        check_place(tmp_path / "a", 1 << 50)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PlaceError, match=r"Permission denied"):
            check_place(tmp_path / "a.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "a.mp4"
    lock = Lock(path)
    with pytest.raises(InUse, match=r"a\.mp4 is being written by another run"):
        Lock(path)
    Lock(tmp_path / "b.mp4").release()
    lock.release()
    lock.release()
    Lock(path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_holds_against_other_processes_and_ends_with_them(tmp_path):
    path = tmp_path / "a.mp4"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(InUse):
                Lock(path)
        finally:
            other.send_signal(signal.SIGKILL)
    lock = Lock(path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_many_processes_take_turns(tmp_path):
    """Each holds the lock for a moment and adds a line; removing and taking it again must let no two in."""
    code = ("import sys, time\nfrom comfyui_qvg.qvg.files import InUse, Lock\n"
            "for turn in range(25):\n    while True:\n        try:\n"
            "            lock = Lock(sys.argv[1]); break\n        except InUse: time.sleep(0.001)\n"
            "    text = open(sys.argv[1]).read(); time.sleep(0.001); open(sys.argv[1], 'w').write(text + 'x'); lock.release()")
    (tmp_path / "a").write_text("")
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")]) for _ in range(3)]
    assert [other.wait(timeout=600) for other in others] == [0, 0, 0]
    assert (tmp_path / "a").read_text() == "x" * 75


def test_what_fails_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def half(place):
        place.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"/a could not be written \(No space left on device\)\. Free some space"):
        write_atomically(path, half)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, lambda place: place.write_text("new"))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_parts_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    """A process is killed while it writes; what others call .part is theirs."""
    path = tmp_path / "a[1].mp4"
    for name in ("a[1].mp4.part", "a[1].mp4.0123456.part", "a1.mp4.01234567.part", "a[1].mp4.0123456g.part", "a[1].mp4.01234567.party"):
        (tmp_path / name).write_text("")
    kept = sorted(entry.name for entry in tmp_path.iterdir())
    code = ("import sys, time; from comfyui_qvg.qvg.files import write_atomically\n"
            "write_atomically(sys.argv[1], lambda place: (place.write_text('x'), print('half', flush=True), time.sleep(60)))")
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "half\n"
        other.kill()
    for _ in range(50):
        if len(list(tmp_path.iterdir())) == len(kept) + 1:
            break
        time.sleep(0.1)
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    remove_parts(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == kept
