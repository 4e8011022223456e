"""A growing .mp4 or .webm on disk: parts are appended, and an index is written at the end."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from ..files import write_atomically, write_error
from .containers import Container, Mp4, WebM
from .written import Written, chained_digest

FORMATS: dict[str, Container] = {".mp4": Mp4, ".webm": WebM}
BT709 = 1


class ContainerFile:
    """One file of encoded video. frame_rate: frames per second; quality: constant rate factor, lower is better."""

    # temporary files are named after `path` itself
    pattern = None

    def __init__(self, path: Path, frame_rate: int, quality: int | None):
        self.path, self.frame_rate, self.format = path, frame_rate, FORMATS[path.suffix.lower()]
        self.quality = self.format.quality if quality is None else quality
        self.tried = path

    def existing(self) -> Path | None:
        return self.path if self.path.exists() else None

    def create(self) -> None:
        self.path.touch(exist_ok=False)

    def discard(self) -> None:
        """Remove a file without frames."""
        self.path.unlink(missing_ok=True)

    def resume(self, frames: int, digest: str) -> Written:
        """Keep the first `frames` frames of the file. Raises ValueError if it is not what an earlier writer left."""
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing, but {frames} frames were written to it before. Put it back, or start over.")
        # the packets are copied, because half a part or an index may follow them
        found = self._rewrite(self.format.growing, frames, digest)
        return Written(frames, self.path.stat().st_size, found)

    def append(self, frames: list[tuple[int, np.ndarray]], before: Written) -> Iterator[Written]:
        """Encode numbered frames uint8 [H, W, 3], append them, and yield what is then on the disk."""
        height, width = frames[0][1].shape[:2]
        part = PartEncoder(self.format, width, height, self.frame_rate, self.quality, before.frames)
        for _, frame in frames:
            part.write(frame)
        data = part.finish()
        digest = before.digest
        with av.open(io.BytesIO(data)) as file:
            for packet in _packets(file):
                digest = chained_digest(digest.encode(), bytes(packet))
        data = self.format.part(data, before.frames)
        self._append(data, before.size)
        yield Written(before.frames + len(frames), before.size + len(data), digest)

    def _append(self, data: bytes, size: int) -> None:
        """Put data after the first `size` bytes of the file, in place of what a failed attempt left there."""
        try:
            with open(self.path, "rb+") as file:
                if file.seek(0, os.SEEK_END) < size:
                    raise OSError("it has become shorter since it was written")
                file.truncate(size)
                try:
                    file.seek(size)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise write_error(self.path, error) from error

    def finish(self, written: Written) -> None:
        """Write an index, so that players know the length and can seek. Raises OSError if the disk refuses."""
        try:
            self._rewrite(self.format.closed, written.frames, written.digest)
        except OSError as error:
            raise OSError(f"{self.path} holds all of its {written.frames} frames and plays, but the index by which players seek is "
                          f"missing: {error}") from error

    def _rewrite(self, options: dict[str, str], frames: int, digest: str) -> str:
        """Replace the file by its first `frames` frames in a container with other options. Returns their digest."""
        found = ""

        def write(place: Path) -> None:
            nonlocal found
            try:
                count, found = self._copy_packets(place, options, frames)
            except (av.FFmpegError, IndexError) as error:
                if isinstance(error, OSError) or getattr(error, "errno", None) == errno.ENOSPC:
                    raise OSError(error.strerror) from None
                raise ValueError(f"{self.path} is not a video that can be continued ({error}). Put back the file that was written before, "
                                 "or start over.") from None
            if count < frames:
                raise ValueError(f"{self.path} holds {count} frames of the {frames} that were written to it before. Put the file back, "
                                 "or start over.")
            if digest and found != digest:
                raise ValueError(f"{self.path} is not the video whose {frames} frames were written before, but another one. Put the file "
                                 "back, or start over.")

        write_atomically(self.path, write)
        return found

    def _copy_packets(self, target: Path, options: dict[str, str], frames: int) -> tuple[int, str]:
        """Copy at most `frames` packets; how many there were, and their digest."""
        copied, digest = 0, ""
        options = options | self.format.options(self.frame_rate)
        with av.open(str(self.path)) as old, av.open(str(target), "w", format=self.format.container, options=options) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in _packets(old):
                if copied == frames:
                    break
                digest = chained_digest(digest.encode(), bytes(packet))
                packet.stream = stream
                new.mux(packet)
                copied += 1
        return copied, digest


class PartEncoder:
    """Encodes one part of a video, in memory, whose first frame is number `first` of the video."""

    def __init__(self, kind: Container, width: int, height: int, frame_rate: int, quality: int, first: int):
        self._data = io.BytesIO()
        self._container = av.open(self._data, "w", format=kind.container, options=kind.growing | kind.options(frame_rate))
        self._stream = self._container.add_stream(kind.codec, rate=frame_rate, options={"crf": str(quality), **kind.encoder})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.colorspace = self._stream.codec_context.color_trc = BT709
        self._stream.codec_context.color_primaries = BT709
        self._next = 0 if kind.shifts_parts else first

    def write(self, pixels: np.ndarray) -> None:
        """Encode a frame uint8 [H, W, 3]."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts = self._next
        frame.time_base = 1 / self._stream.codec_context.framerate
        self._next += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """The whole container."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._data.getvalue()


def _packets(file) -> Iterator[av.Packet]:
    """Encoded frames of a container, in order."""
    return (packet for packet in file.demux(file.streams.video[0]) if packet.dts is not None)
