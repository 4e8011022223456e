"""A video that is watched while it grows: chunks of latents become frames, and frames become a file, in memory that does not grow.

    decoder, writer = ChunkDecoder(vae), VideoWriter("ball.mp4", frame_rate=16)
    for latents in chunks:
        writer.write(decoder(latents))
        writer.cut()                            # everything up to here is in the file, whatever happens next
    writer.close()

`ChunkDecoder` keeps what the VAE's causal convolutions saw last, so that its frames are those of one decode of the whole video.

`VideoWriter` encodes from cut to cut, each part with an encoder of its own, and appends the parts to one file: fragmented MP4 and live
WebM are made of a head and parts that follow each other. So the file plays at any moment, and a run that was killed goes on behind the
frames that its session remembers, with the pictures of a run that never stopped. `close` writes a copy with an index, which players need to
seek, and puts it in the file's place.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .models.wan_vae import WanVAE, denormalize, normalize
from .storage import write_atomically

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

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken. Raises ValueError where the decoder has no such layers."""
        modules = dict(self.vae.decoder.named_modules())
        unknown = sorted(set(state) - set(modules))
        if unknown:
            raise ValueError(f"The saved decoder has a layer {unknown[0]}, which this VAE lacks. Load the VAE that made the video.")
        weight = self.vae.conv2.weight
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


def read_frames(paths: list[str | Path], width: int, height: int) -> Tensor:
    """Images and videos, one after the other, as video [1, 3, n, height, width] in -1..1.

    Raises ValueError for a file that holds no picture.
    """
    frames = []
    for path in paths:
        try:
            with av.open(str(path)) as file:
                frames += [frame.to_ndarray(format="rgb24", width=width, height=height) for frame in file.decode(video=0)]
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path} cannot be read as an image or a video ({error}). Give PNG, JPEG, MP4 or WebM.") from None
    pixels = torch.from_numpy(np.stack(frames)).float() / 127.5 - 1
    return pixels.permute(3, 0, 1, 2)[None]


def to_bytes(video: Tensor) -> Tensor:
    """Video [3, F, H, W] in -1..1 -> pixels uint8 [F, H, W, 3] on the CPU."""
    return video.permute(1, 2, 3, 0).float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


class VideoWriter:
    """Pixels to a file that grows: .mp4 (H.264), .webm (VP9), or .png for numbered images beside each other.

    frame_rate: frames a second. quality: constant rate factor, lower is better. frames: how many the file has from an
    earlier writer, to go on behind them; what it holds beyond is cut off.
    Raises ValueError for another ending, or where the file to go on with does not hold that much.
    """

    def __init__(self, path: str | Path, frame_rate: int, *, quality: int | None = None, frames: int = 0):
        self.path, self.frame_rate = Path(path), frame_rate
        formats = {".mp4": _Mp4, ".webm": _WebM, ".png": None}
        if self.path.suffix.lower() not in formats:
            raise ValueError(f"A video cannot be written as {self.path.suffix or 'a file without an ending'}; use .mp4, .webm or .png.")
        self._format = formats[self.path.suffix.lower()]
        self._quality = quality if quality is not None or self._format is None else self._format.quality
        self.frames = frames
        self._part: _Part | None = None
        if self._format is not None:
            self._open()

    def _open(self) -> None:
        if not self.frames:
            self.path.write_bytes(b"")
        elif not self.path.is_file():
            raise ValueError(f"{self.path} is not there, but {self.frames} frames were written to it before. Put it back, or begin anew.")
        else:
            # the same packets once more, because what lies behind them may be half a fragment, or an index that `close` wrote
            self._rewrite(self._format.growing)

    def write(self, pixels: Tensor) -> None:
        """Append pixels uint8 [F, H, W, 3]."""
        for frame in pixels.numpy():
            if self._format is None:
                image = Image.fromarray(frame)
                write_atomically(self.image_path(self.frames), lambda place, image=image: image.save(place, "png"))
                self.frames += 1
                continue
            if self._part is None:
                self._part = _Part(self._format, frame.shape[1], frame.shape[0], self.frame_rate, self._quality, self.frames)
            self._part.write(frame)

    def image_path(self, number: int) -> Path:
        """ball.png -> ball_000000.png, ball_000001.png and so on."""
        return self.path.with_name(f"{self.path.stem}_{number:06d}.png")

    def cut(self) -> None:
        """Encode what has been written since the last cut, append it, and see it onto the disk."""
        if self._part is None:
            return
        data, count = self._part.finish(), self._part.count
        self._part = None
        data = self._format.part(data, self.frames)
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.frames += count

    def close(self) -> None:
        """Cut, and give the file an index, so that players know its length and can seek. A file without frames is removed."""
        self.cut()
        if self._format is None:
            return
        if self.frames:
            self._rewrite(self._format.closed)
        else:
            self.path.unlink(missing_ok=True)

    def _rewrite(self, options: dict[str, str]) -> None:
        """The same encoded frames in a container with other options, in the place of the file."""
        options = options | _common(self._format, self.frame_rate)

        def write(place: Path) -> None:
            found = _remux(self.path, place, self._format.container, options, self.frames)
            if found < self.frames:
                raise ValueError(f"{self.path} holds {found} frames of the {self.frames} that were written to it before. Put the file "
                                 "back, or begin anew.")

        write_atomically(self.path, write)


def _common(kind, frame_rate: int) -> dict[str, str]:
    # without the flag, a WebM gets a random name
    return {"fflags": "+bitexact"} | ({"video_track_timescale": str(TICKS * frame_rate)} if kind is _Mp4 else {})


def _remux(source: Path, target: Path, container: str, options: dict[str, str], frames: int) -> int:
    """Copy the first packets of a video; how many there were, `frames` at most."""
    copied = 0
    with av.open(str(source)) as old, av.open(str(target), "w", format=container, options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is None or copied == frames:
                break
            packet.stream = stream
            new.mux(packet)
            copied += 1
    return copied


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
