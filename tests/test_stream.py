"""Chunks to frames and frames to files: against whole decodes, through every file format, cut off at any byte."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_qvg.qvg.models.wan_vae import WanVAE, denormalize, normalize
from comfyui_qvg.qvg.stream import ChunkDecoder, VideoWriter, encode_stream, read_frames, to_bytes

FORMATS = (".mp4", ".webm")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(8).requires_grad_(False).eval()


def pixels(count, first=0):
    """A picture that moves, uint8 [count, 48, 64, 3]."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    moments = range(first, first + count)
    return torch.stack([torch.stack([2 * x + 3 * i, 4 * y + i, x + y], -1) for i in moments]).clamp(0, 255).to(torch.uint8)


def read(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.parametrize("lengths", [(1,), (3, 3, 1), (1, 2, 4), (7,)])
def test_chunks_equal_a_whole_decode(vae, lengths):
    latents = torch.randn(1, 16, sum(lengths), 2, 3)
    decoder = ChunkDecoder(vae)
    parts = torch.cat([decoder(chunk) for chunk in latents.split(lengths, 2)], 2)
    assert (parts - vae.decode(denormalize(latents))).abs().max() < 1e-4


def test_a_decoder_goes_on_from_its_state(vae):
    """Bit for bit, as a resumed run needs it."""
    latents = torch.randn(1, 16, 6, 2, 3)
    whole, first, second = ChunkDecoder(vae), ChunkDecoder(vae), ChunkDecoder(vae)
    expected = torch.cat([whole(chunk) for chunk in latents.split(3, 2)], 2)
    made = first(latents[:, :, :3])
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    assert torch.equal(torch.cat([made, second(latents[:, :, 3:])], 2), expected)
    with pytest.raises(ValueError, match="which this VAE lacks"):
        second.restore({"attic": torch.zeros(1)})


def test_encoding_in_pieces_equals_a_whole_encode(vae):
    video = torch.rand(1, 3, 15, 16, 24) * 2 - 1
    latents = encode_stream(vae, video)
    assert latents.shape[2] == 4
    assert (latents - normalize(vae.encode(video[:, :, :13]))).abs().max() < 1e-4


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_plays_while_it_grows(tmp_path, ending):
    path = tmp_path / f"ball{ending}"
    writer, count = VideoWriter(path, 16), 0
    for length in (9, 12, 12, 5):
        writer.write(pixels(length, count))
        writer.cut()
        count += length
        assert writer.frames == len(read(path)) == count
    writer.close()
    shown = read(path)
    assert len(shown) == 38
    assert np.abs(shown.astype(int) - pixels(38).numpy()).mean() < 4
    with av.open(str(path)) as file:
        assert file.duration == pytest.approx(38 / 16 * av.time_base, rel=0.01)
        assert file.streams.video[0].average_rate == 16


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_that_was_cut_off_goes_on_with_the_same_bytes(tmp_path, ending):
    """A run is killed while it writes; the next one begins behind the frames that are known to be there."""
    lengths = (9, 12, 12, 12)

    def write(writer, lengths):
        for length in lengths:
            writer.write(pixels(length, writer.frames))
            writer.cut()

    whole = VideoWriter(tmp_path / f"whole{ending}", 16)
    write(whole, lengths)
    grown = whole.path.read_bytes()
    whole.close()
    path = tmp_path / f"killed{ending}"
    sizes = []
    first = VideoWriter(path, 16)
    for length in lengths[:2]:
        write(first, [length])
        sizes.append(path.stat().st_size)
    for end in np.linspace(sizes[1], len(grown), 5).astype(int):
        path.write_bytes(grown[:end])
        second = VideoWriter(path, 16, frames=21)
        assert len(read(path)) == 21
        write(second, lengths[2:])
        second.close()
        assert path.read_bytes() == whole.path.read_bytes()
    assert len(read(path)) == 45
    # a finished file is made longer
    third = VideoWriter(path, 16, frames=45)
    write(third, [8])
    third.close()
    assert len(read(path)) == 53 and np.array_equal(read(path)[:45], read(whole.path))


def test_what_is_missing_is_said(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16)
    writer.write(pixels(5))
    writer.close()
    before = writer.path.read_bytes()
    with pytest.raises(ValueError, match="holds 5 frames of the 9"):
        VideoWriter(tmp_path / "a.mp4", 16, frames=9)
    assert writer.path.read_bytes() == before
    with pytest.raises(ValueError, match="is not there"):
        VideoWriter(tmp_path / "b.mp4", 16, frames=9)
    with pytest.raises(ValueError, match=r"use \.mp4, \.webm or \.png"):
        VideoWriter(tmp_path / "a.gif", 16)


def test_numbered_images(tmp_path):
    writer = VideoWriter(tmp_path / "ball.png", 16)
    writer.write(pixels(3))
    writer.cut()
    VideoWriter(tmp_path / "ball.png", 16, frames=3).write(pixels(2, 3))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"ball_{number:06d}.png" for number in range(5)]
    assert np.array_equal(np.stack([np.asarray(Image.open(tmp_path / name)) for name in names]), pixels(5).numpy())


def test_reading_images_and_videos(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, quality=1)
    writer.write(pixels(5))
    writer.close()
    Image.fromarray(pixels(1)[0].numpy()).save(tmp_path / "a.png")
    video = read_frames([tmp_path / "a.png", tmp_path / "a.mp4"], 32, 24)
    assert video.shape == (1, 3, 6, 24, 32)
    assert (video[:, :, 0] - video[:, :, 1]).abs().mean() < 0.05
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as an image or a video"):
        read_frames([tmp_path / "a.txt"], 32, 24)


def test_pixels():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 1, 5)
    assert to_bytes(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
