"""The containers of a growing video, as PyAV writes them: fragmented MP4 and live WebM.

Both are a header followed by parts. Each part is encoded alone, with an encoder of its own; `part` turns its file into the bytes to append.
"""

from __future__ import annotations

from collections.abc import Iterator

# of an MP4's clock, per frame
TICKS = 1000
# first bytes of a WebM cluster
CLUSTER = bytes.fromhex("1f43b675")


class Mp4:
    """H.264. quality: the default constant rate factor. growing, closed: container options while it grows, and with an index."""

    container, codec, quality = "mp4", "libx264", 18
    growing = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
    closed = {"movflags": "faststart"}
    # one thread: the bytes must not depend on how many cores there are or how busy they are
    encoder = {"preset": "medium", "bf": "0", "threads": "1"}
    # timestamps of a part count from 0; `part` shifts them
    shifts_parts = True

    @staticmethod
    def options(frame_rate: int) -> dict[str, str]:
        return {"fflags": "+bitexact", "video_track_timescale": str(TICKS * frame_rate)}

    @staticmethod
    def part(data: bytes, first: int) -> bytes:
        """The fragments (moof and mdat) of a fragmented MP4, shifted to frame `first`; at frame 0 with the header before them."""
        kept = []
        for kind, start, stop in _boxes(data, 0, len(data)):
            box = bytearray(data[start:stop])
            if kind == b"moof":
                _shift_fragment_(box, first)
            if kind in (b"moof", b"mdat") or (not first and kind in (b"ftyp", b"moov")):
                kept.append(bytes(box))
        return b"".join(kept)


class WebM:
    """VP9, with the fields of `Mp4`."""

    container, codec, quality = "webm", "libvpx-vp9", 24
    growing = {"live": "1"}
    closed = {}
    encoder = {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
    shifts_parts = False

    @staticmethod
    def options(frame_rate: int) -> dict[str, str]:
        # without the flag, a WebM gets a random name
        return {"fflags": "+bitexact"}

    @staticmethod
    def part(data: bytes, first: int) -> bytes:
        """The clusters of a live WebM, whose timestamps are already those of the video; at frame 0 with the header before them."""
        return data[data.index(CLUSTER):] if first else data


Container = type[Mp4] | type[WebM]


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, end) of the MP4 boxes between two offsets. Source: ISO/IEC 14496-12."""
    while start < stop:
        end = start + int.from_bytes(data[start:start + 4], "big")
        yield bytes(data[start + 4:start + 8]), start, end
        start = end


def _shift_fragment_(moof: bytearray, frames: int) -> None:
    """Make a fragment begin `frames` later: its decode time, and its sequence number, which has to grow."""
    for kind, start, stop in _boxes(moof, 8, len(moof)):
        if kind == b"mfhd":
            number = int.from_bytes(moof[start + 12:start + 16], "big") + frames
            moof[start + 12:start + 16] = number.to_bytes(4, "big")
        elif kind == b"traf":
            for inner, at, end in _boxes(moof, start + 8, stop):
                if inner == b"tfdt":
                    # version 1 has 8 bytes of time, version 0 has 4
                    moof[at + 12:end] = (int.from_bytes(moof[at + 12:end], "big") + frames * TICKS).to_bytes(end - at - 12, "big")
