"""A video that is watched while it grows: chunks of latents become frames, and frames become a file, in memory that does not grow.

    decoder, writer = ChunkDecoder(vae), VideoWriter("ball.mp4", frame_rate=16)
    for latents in chunks:
        writer.write(decoder(latents))
        writer.cut()                            # everything up to here is in the file, whatever happens next
    writer.close()

`ChunkDecoder` keeps what the VAE's causal convolutions saw last, so that its frames are those of one decode of the whole video.

`VideoWriter` encodes from cut to cut, each part with an encoder of its own, and appends the parts to one file: fragmented MP4 and live
WebM are made of a head and parts that follow each other. So the file plays at any moment, and a run that was killed goes on behind the
frames that its session remembers, with the pictures of a run that never stopped. Frames are kept until they are on the disk, so a cut that
fails can be tried again. `close` writes a copy with an index, which players need to seek, and puts it in the file's place.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..files.fields import short_repr
from ..files.places import Lock, Taken, check_place, failed, remove_parts, write_atomically
from ..models.wan_vae import WanVAE, denormalize, normalize

CLUSTER = bytes.fromhex("1f43b675")
TICKS = 1000  # of an MP4's clock in a frame
BT709 = 1


class ChunkDecoder:
    """Latents [B, 16, f, H, W] as the network makes them -> video [B, 3, n, 8H, 8W], about -1..1: the next frames of the video."""

    def __init__(self, vae: WanVAE):
        self.vae = vae
        self.memory: dict[nn.Module, Tensor] = {}

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        z = denormalize(latents).to(self.vae.conv2.weight.dtype)
        parts = [self.vae.decoder(self.vae.conv2(z[:, :, index:index + 1], {}), self.memory) for index in range(z.shape[2])]
        return torch.cat(parts, dim=2)

    def state(self) -> dict[str, Tensor]:
        """What was seen last, by the names of the layers."""
        names = {module: name for name, module in self.vae.decoder.named_modules()}
        return {names[module]: tensor for module, tensor in self.memory.items()}

    def restore(self, state: dict[str, Tensor], shape: tuple[int, ...], frames: int) -> None:
        """Go on where `state` was taken, behind so many latent frames of `shape` (B, C, H, W). Raises ValueError where it is none of this
        decoder, or lacks a layer."""
        expected = self.vae.decoder.memory_shapes(shape, frames)
        for name in sorted(expected.keys() | state.keys()):
            if name not in expected:
                raise ValueError(f"The saved decoder has a layer {name[:100]!r}, which this VAE lacks. Load the VAE that made the video.")
            if name not in state or tuple(state[name].shape) != expected[name]:
                found = f"has shape {short_repr(list(state[name].shape))}" if name in state else "is missing"
                raise ValueError(f"The saved decoder's layer {name} {found}, where this VAE has {list(expected[name])}. Load the VAE that "
                                 "made the video, or use an earlier checkpoint.")
        modules, weight = dict(self.vae.decoder.named_modules()), self.vae.conv2.weight
        self.memory = {modules[name]: tensor.to(weight) for name, tensor in state.items()}


@torch.no_grad()
def encode_stream(vae: WanVAE, video: Tensor) -> Tensor:
    """Video [B, 3, n, 8H, 8W] in -1..1 -> latents [B, 16, F, H, W] as the network reads them, in the memory of four frames.

    Equal to one encode of the whole video. Frames after the last whole group of four are left out.
    """
    memory: dict[nn.Module, Tensor] = {}
    stops = range(1, video.shape[2] + 1, 4)
    parts = [vae.encoder(video[:, :, max(0, stop - 4):stop].to(vae.conv1.weight), memory) for stop in stops]
    return normalize(torch.cat([vae.conv1(part, {}).chunk(2, dim=1)[0] for part in parts], dim=2)).float()


def to_bytes(video: Tensor) -> Tensor:
    """Video [3, F, H, W] in -1..1 -> pixels uint8 [F, H, W, 3] on the CPU."""
    return video.permute(1, 2, 3, 0).float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


@dataclass(frozen=True)
class _Written:
    """What is safely on the disk: frames; bytes of the growing file; a digest of the frames as they are encoded."""

    frames: int = 0
    size: int = 0
    digest: str = ""


class VideoWriter:
    """Pixels to a file that grows: .mp4 (H.264), .webm (VP9), or .png for numbered images beside each other.

    frame_rate: frames a second. quality: constant rate factor, lower is better. frames: how many the file has from an earlier writer, to
    go on behind them; what it holds beyond is cut off. digest: of that writer, to know its file again. overwrite: put the video in the
    place of another one, which stays until there are frames.
    Raises ValueError for another ending, where the file to go on with is not what an earlier writer left behind, and where a new one
    cannot be made: `files.Taken`, `files.InUse` and `files.PlaceError`.
    """

    def __init__(self, path: str | Path, frame_rate: int, *, quality: int | None = None, frames: int = 0, digest: str = "",
                 overwrite: bool = False):
        self.path, self.frame_rate = Path(path), frame_rate
        formats = {".mp4": _Mp4, ".webm": _WebM, ".png": None}
        if self.path.suffix.lower() not in formats:
            raise ValueError(f"A video cannot be written as {self.path.suffix or 'a file without an ending'}; use .mp4, .webm or .png.")
        self._format = formats[self.path.suffix.lower()]
        self._quality = quality if quality is not None or self._format is None else self._format.quality
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._written, self._new = _Written(frames), False
        check_place(self.path if self._format else self.image_path(0))
        self._lock = Lock(self.path)
        try:
            remove_parts(self.path, None if self._format else self._images())
            if frames:
                self._go_on(digest)
            else:
                self._begin(overwrite)
        except BaseException:
            self._lock.release()
            raise

    @property
    def frames(self) -> int:
        """On the disk. What was written since the last cut is not counted."""
        return self._written.frames

    @property
    def digest(self) -> str:
        """A name of what is on the disk."""
        return self._written.digest

    def _begin(self, overwrite: bool) -> None:
        there = self.path if self._format else next(iter(self._images_there()), self.path)
        if there.exists() and not overwrite:
            raise Taken(f"{there} is there already. Choose another name.")
        self._new = not there.exists()
        if self._format and self._new:
            self.path.touch(exist_ok=False)

    def _go_on(self, digest: str) -> None:
        if self._format:
            if not self.path.is_file():
                raise ValueError(f"{self.path} is not there, but {self.frames} frames were written to it before. Put it back, or begin "
                                 "anew.")
            # the same packets once more, because what lies behind them may be half a fragment, or an index that `close` wrote
            found = self._rewrite(self._format.growing, digest)
            self._written = _Written(self.frames, self.path.stat().st_size, found)
            return
        there = {self.image_path(number) for number in range(self.frames)} & set(self._images_there())
        if len(there) < self.frames:
            missing = next(path for path in map(self.image_path, range(self.frames)) if path not in there)
            raise ValueError(f"{missing} is not there, but {self.frames} pictures were written before, and {self.frames - len(there)} are "
                             "missing. Put them back, or begin anew.")
        found = _digest(b"", self.image_path(self.frames - 1).read_bytes())
        if digest and found != digest:
            raise ValueError(f"{self.image_path(self.frames - 1)} is not the picture that was written before. Put it back, or begin anew.")
        self._written = _Written(self.frames, 0, found)

    def write(self, pixels: Tensor) -> None:
        """Append pixels uint8 [F, H, W, 3], which the next cut brings to the disk."""
        for frame in pixels.numpy():
            number = self._waiting[-1][0] + 1 if self._waiting else self.frames
            self._waiting.append((number, frame))

    def image_path(self, number: int) -> Path:
        """ball.png -> ball_000000.png, ball_000001.png and so on."""
        return self.path.with_name(f"{self.path.stem}_{number:06d}.png")

    def _images(self) -> str:
        """What the names of the images look like, for `glob`."""
        return f"{glob.escape(self.path.stem)}_{'[0-9]' * 6}.png"

    def _images_there(self) -> list[Path]:
        return sorted(self.path.parent.glob(self._images()))

    def cut(self) -> None:
        """Encode what has been written since the last cut, append it, and see it onto the disk.

        Where that fails, with OSError or an interrupt, the frames are kept and the next cut tries again.
        """
        before = self._written
        # an interrupt may have come between the last frame on the disk and this list
        self._waiting = [(number, frame) for number, frame in self._waiting if number >= before.frames]
        if not self._waiting:
            return
        if self._format is None:
            self._cut_images(before)
        else:
            height, width = self._waiting[0][1].shape[:2]
            part = _Part(self._format, width, height, self.frame_rate, self._quality, before.frames)
            for _, frame in self._waiting:
                part.write(frame)
            data = part.finish()
            digest = before.digest
            with av.open(io.BytesIO(data)) as file:
                for packet in _packets(file):
                    digest = _digest(digest.encode(), bytes(packet))
            data = self._format.part(data, before.frames)
            self._append(data, before.size)
            self._written = _Written(before.frames + len(self._waiting), before.size + len(data), digest)
        self._waiting = []

    def _cut_images(self, before: _Written) -> None:
        if not before.size:
            # pictures of a longer video, or of a run that was killed
            for path in self._images_there():
                if path.stem[-6:] >= f"{before.frames:06d}":
                    path.unlink()
        for number, frame in self._waiting:
            path, image = self.image_path(number), Image.fromarray(frame)
            write_atomically(path, partial(image.save, format="png"))
            self._written = _Written(number + 1, 1, _digest(b"", path.read_bytes()))

    def _append(self, data: bytes, size: int) -> None:
        """Put data behind the first `size` bytes of the file; what a failed attempt left there goes."""
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
            raise failed(self.path, error) from error

    def close(self) -> None:
        """Cut, and give the file an index, so that players know its length and can seek. A file without frames is removed.

        Raises OSError where the disk refuses; the file then plays up to the last cut that went well.
        """
        try:
            self.cut()
            if self._format and self.frames:
                try:
                    self._rewrite(self._format.closed, self.digest)
                except OSError as error:
                    raise OSError(f"{self.path} holds all of its {self.frames} frames and plays, but the index by which players seek is "
                                  f"missing: {error}") from error
        finally:
            self.release()

    def release(self) -> None:
        """Leave the file as it grows, for another writer to go on behind the last cut. A new one without frames is removed."""
        if self._lock.held and self._format and self._new and not self.frames:
            self.path.unlink(missing_ok=True)
        self._lock.release()

    def _rewrite(self, options: dict[str, str], digest: str) -> str:
        """The same encoded frames in a container with other options, in the place of the file; returns their digest."""
        options = options | _common(self._format, self.frame_rate)
        found = ""

        def write(place: Path) -> None:
            nonlocal found
            try:
                count, found = _remux(self.path, place, self._format.container, options, self.frames)
            except (av.FFmpegError, IndexError) as error:
                if isinstance(error, OSError) or getattr(error, "errno", None) == errno.ENOSPC:
                    raise OSError(error.strerror) from None
                raise ValueError(f"{self.path} is no video that can be gone on with ({error}). Put back the file that was written before, "
                                 "or begin anew.") from None
            if count < self.frames:
                raise ValueError(f"{self.path} holds {count} frames of the {self.frames} that were written to it before. Put the file "
                                 "back, or begin anew.")
            if digest and found != digest:
                raise ValueError(f"{self.path} is not the video whose {self.frames} frames were written before, but another one. Put the "
                                 "file back, or begin anew.")

        write_atomically(self.path, write)
        return found


def _digest(before: bytes, data: bytes) -> str:
    return hashlib.sha256(before + data).hexdigest()


def _packets(file):
    """Encoded frames of a container, in order."""
    return (packet for packet in file.demux(file.streams.video[0]) if packet.dts is not None)


def _common(kind, frame_rate: int) -> dict[str, str]:
    # without the flag, a WebM gets a random name
    return {"fflags": "+bitexact"} | ({"video_track_timescale": str(TICKS * frame_rate)} if kind is _Mp4 else {})


def _remux(source: Path, target: Path, container: str, options: dict[str, str], frames: int) -> tuple[int, str]:
    """Copy the first packets of a video; how many there were, `frames` at most, and their digest."""
    copied, digest = 0, ""
    with av.open(str(source)) as old, av.open(str(target), "w", format=container, options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in _packets(old):
            if copied == frames:
                break
            digest = _digest(digest.encode(), bytes(packet))
            packet.stream = stream
            new.mux(packet)
            copied += 1
    return copied, digest


class _Mp4:
    container, codec, quality = "mp4", "libx264", 18
    growing = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
    closed = {"movflags": "faststart"}
    # one thread: the bytes must not depend on how many cores there are or how busy they are
    encoder = {"preset": "medium", "bf": "0", "threads": "1"}

    @staticmethod
    def part(data: bytes, first: int) -> bytes:
        """The fragments of a fragmented MP4 (moof and mdat), moved to frame `first`; at 0 with the head before them."""
        kept = []
        for kind, start, stop in _boxes(data, 0, len(data)):
            box = bytearray(data[start:stop])
            if kind == b"moof":
                _shift_fragment(box, first)
            if kind in (b"moof", b"mdat") or (not first and kind in (b"ftyp", b"moov")):
                kept.append(bytes(box))
        return b"".join(kept)


def _boxes(data: bytes, start: int, stop: int):
    """(kind, first byte, end) of the boxes of an MP4 between two places. Source: ISO/IEC 14496-12."""
    while start < stop:
        end = start + int.from_bytes(data[start:start + 4], "big")
        yield bytes(data[start + 4:start + 8]), start, end
        start = end


def _shift_fragment(moof: bytearray, frames: int) -> None:
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


class _WebM:
    container, codec, quality = "webm", "libvpx-vp9", 24
    growing = {"live": "1"}
    closed = {}
    encoder = {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}

    @staticmethod
    def part(data: bytes, first: int) -> bytes:
        """The clusters of a live WebM, whose times are those of the video; at frame 0 with the head before them."""
        return data[data.index(CLUSTER):] if first else data


class _Part:
    """What lies between two cuts: a container in memory with an encoder of its own, whose first frame is number `first` of the video."""

    def __init__(self, kind, width: int, height: int, frame_rate: int, quality: int, first: int):
        self._data = io.BytesIO()
        self._container = av.open(self._data, "w", format=kind.container, options=kind.growing | _common(kind, frame_rate))
        self._stream = self._container.add_stream(kind.codec, rate=frame_rate, options={"crf": str(quality), **kind.encoder})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.colorspace = self._stream.codec_context.color_trc = BT709
        self._stream.codec_context.color_primaries = BT709
        self._offset = 0 if kind is _Mp4 else first
        self.count = 0

    def write(self, pixels) -> None:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts = self._offset + self.count
        frame.time_base = 1 / self._stream.codec_context.framerate
        self.count += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._data.getvalue()
