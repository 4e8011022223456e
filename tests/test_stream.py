"""Chunks to frames and frames to files: against whole decodes, through every file format, cut off at any byte."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_qvg.qvg.files import InUse, Taken
from comfyui_qvg.qvg.models.wan_vae import WanVAE, denormalize, normalize
from comfyui_qvg.qvg.video import container_file, image_files
from comfyui_qvg.qvg.video.container_file import PartEncoder
from comfyui_qvg.qvg.video.containers import Mp4
from comfyui_qvg.qvg.video.decode import ChunkDecoder, encode_stream, to_bytes
from comfyui_qvg.qvg.video.reader import read_frames
from comfyui_qvg.qvg.video.writer import VideoWriter

FORMATS = (".mp4", ".webm")


@pytest.fixture
def repeatable(monkeypatch):
    """The same frames are encoded to the same bytes. The macroblock tree of x264 gives others for 1 in 1,500 of pictures as small as here;
    it gave the same for 3,000 of 320x192."""
    monkeypatch.setitem(Mp4.encoder, "x264-params", "mbtree=0")


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
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, (1, 16, 2, 3), 3)
    assert torch.equal(torch.cat([made, second(latents[:, :, 3:])], 2), expected)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_what_a_decoder_remembers_is_known_beforehand(vae, frames):
    decoder = ChunkDecoder(vae)
    decoder(torch.randn(2, 16, frames, 2, 3))
    assert {name: tuple(tensor.shape) for name, tensor in decoder.state().items()} == vae.decoder.memory_shapes((2, 16, 2, 3), frames)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update(attic=torch.zeros(1)), "'attic', which this VAE lacks"),
    (lambda state: state.pop("conv1"), "layer conv1 is missing"),
    (lambda state: state.clear(), "layer conv1 is missing"),
    (lambda state: state.update(conv1=state["conv1"][..., :1]), r"layer conv1 has shape \[1, 16, 2, 2, 1\], where this VAE has"),
])
def test_a_decoder_does_not_go_on_from_a_state_that_is_not_its_own(vae, change, words):
    decoder = ChunkDecoder(vae)
    decoder(torch.randn(1, 16, 2, 2, 3))
    state = decoder.state()
    change(state)
    other = ChunkDecoder(vae)
    with pytest.raises(ValueError, match=words):
        other.restore(state, (1, 16, 2, 3), 2)
    assert not other.memory


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
        writer.flush()
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
def test_a_file_that_was_cut_off_goes_on_with_the_same_bytes(repeatable, tmp_path, ending):
    """A run is killed while it writes; the next one continues after the frames that are known to be there."""
    lengths = (9, 12, 12, 12)

    def write(writer, lengths):
        for length in lengths:
            writer.write(pixels(length, writer.frames))
            writer.flush()

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
    digest = first.digest
    first.release()
    for end in np.linspace(sizes[1], len(grown), 5).astype(int):
        path.write_bytes(grown[:end])
        second = VideoWriter(path, 16, frames=21, digest=digest)
        assert len(read(path)) == 21
        write(second, lengths[2:])
        second.close()
        assert path.read_bytes() == whole.path.read_bytes()
    assert len(read(path)) == 45
    # a finished file is made longer
    third = VideoWriter(path, 16, frames=45, digest=second.digest)
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
    with pytest.raises(ValueError, match="is missing"):
        VideoWriter(tmp_path / "b.mp4", 16, frames=9)
    with pytest.raises(ValueError, match=r"use \.mp4, \.webm, \.png or \.latent\."):
        VideoWriter(tmp_path / "a.gif", 16)


def test_numbered_images(tmp_path):
    writer = VideoWriter(tmp_path / "ball.png", 16)
    writer.write(pixels(3))
    writer.close()
    again = VideoWriter(tmp_path / "ball.png", 16, frames=3, digest=writer.digest)
    again.write(pixels(2, 3))
    again.close()
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


def written(path, count=9, **options):
    writer = VideoWriter(path, 16, **options)
    writer.write(pixels(count))
    writer.close()
    return writer


@pytest.mark.parametrize("ending", (*FORMATS, ".png"))
def test_nothing_that_is_there_is_replaced(tmp_path, ending):
    path = tmp_path / f"ball{ending}"
    written(path)
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(Taken, match="already exists"):
        VideoWriter(path, 16)
    # one that is asked to replace it and makes nothing leaves it, too
    VideoWriter(path, 16, overwrite=True).close()
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    written(path, 5, overwrite=True)
    assert len(read(path)) == 5 if ending != ".png" else len(list(tmp_path.iterdir())) == 5


def test_other_pictures_are_not_those_of_a_sequence(tmp_path):
    for name in ("ball_1.png", "ball_0000000.png", "ball_000000.jpg", "ball2_000000.png", "ball_00000x.png"):
        (tmp_path / name).write_text("")
    writer = written(tmp_path / "ball.png", 2)
    assert writer.frames == 2 and len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize("ending", (*FORMATS, ".png"))
def test_two_writers_of_one_file(tmp_path, ending):
    path = tmp_path / f"ball{ending}"
    writer = VideoWriter(path, 16)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(InUse, match="written by another run"):
            VideoWriter(path, 16, **options)
    writer.write(pixels(3))
    writer.close()
    assert len(list(tmp_path.iterdir())) == (3 if ending == ".png" else 1)


@pytest.mark.parametrize("ending", (*FORMATS, ".png"))
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_flush_that_fails_loses_no_frame(repeatable, tmp_path, monkeypatch, ending, failure):
    """At every moment: what could not be written is written by the next flush, and the file is that of a run without failures."""
    whole = VideoWriter(tmp_path / f"whole{ending}", 16)
    for length in (9, 12):
        whole.write(pixels(length, 9 * (length == 12)))
        whole.flush()
    whole.close()
    expected = {path.name.removeprefix("whole"): path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*args, **kwargs):
        raise failure

    writer = VideoWriter(tmp_path / f"ball{ending}", 16)
    writer.write(pixels(9))
    writer.flush()
    writer.write(pixels(12, 9))
    sizes = {}
    for place, name in ((container_file.os, "fsync"), (PartEncoder, "write"), (PartEncoder, "finish"), (image_files.Image, "fromarray")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            try:
                writer.flush()
            except (OSError, KeyboardInterrupt):
                assert 9 <= writer.frames <= 21
                sizes[name] = writer.frames
    assert sizes, "nothing failed"
    writer.close()
    assert writer.frames == 21
    assert {path.name.removeprefix("ball"): path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("ball")} == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_a_full_disk_keeps_what_is_written(tmp_path, ending, monkeypatch):
    """The part is half on the disk when it is full: the file plays, and does not hold the half."""
    writer = VideoWriter(tmp_path / f"ball{ending}", 16)
    writer.write(pixels(9))
    writer.flush()
    before = writer.path.read_bytes()
    writer.write(pixels(12, 9))
    with monkeypatch.context() as patch:
        patch.setattr(container_file.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\)"):
            writer.flush()
        assert writer.path.read_bytes() == before and writer.frames == 9
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    assert len(read(writer.path)) == 9
    # the place is free again
    VideoWriter(writer.path, 16, frames=9, digest=writer.digest).close()


@pytest.mark.parametrize("ending", FORMATS)
def test_another_video_is_not_gone_on_with(tmp_path, ending):
    """It has as many frames, and is refused by what they show; the same frames in an indexed file are taken."""
    path = tmp_path / f"ball{ending}"
    digest = written(path).digest
    other = VideoWriter(tmp_path / f"other{ending}", 16)
    other.write(pixels(9, 100))
    other.close()
    mine = path.read_bytes()
    path.write_bytes(other.path.read_bytes())
    with pytest.raises(ValueError, match="is not the video whose 9 frames were written before"):
        VideoWriter(path, 16, frames=9, digest=digest)
    assert path.read_bytes() == other.path.read_bytes()
    path.write_text("no video")
    with pytest.raises(ValueError, match="not a video that can be continued"):
        VideoWriter(path, 16, frames=9, digest=digest)
    path.write_bytes(mine)
    VideoWriter(path, 16, frames=9, digest=digest).close()
    # sessions of the release before hold no digest
    VideoWriter(path, 16, frames=9).close()


def test_a_sequence_with_gaps_is_not_gone_on_with(tmp_path):
    path = tmp_path / "ball.png"
    digest = written(path).digest
    (tmp_path / "ball_000003.png").rename(tmp_path / "away.png")
    with pytest.raises(ValueError, match=r"ball_000003\.png is missing: 1 of the 9 images that were written before are gone"):
        VideoWriter(path, 16, frames=9, digest=digest)
    (tmp_path / "away.png").rename(tmp_path / "ball_000003.png")
    Image.fromarray(pixels(1)[0].numpy()).save(tmp_path / "ball_000008.png")
    with pytest.raises(ValueError, match=r"ball_000008\.png is not the image"):
        VideoWriter(path, 16, frames=9, digest=digest)
    # images after the known ones, of a run that was killed, are replaced or removed
    writer = VideoWriter(path, 16, frames=6)
    writer.write(pixels(1, 6))
    writer.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"ball_{number:06d}.png" for number in range(7)]


def half_and_half(width, height):
    """Red above blue."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (0, height // 2, width, height))
    return image


def sides(picture):
    """Mean red of the upper, lower, left and right half; picture [3, H, W] in -1..1."""
    red, (rows, columns) = (picture[0] + 1) / 2, picture.shape[1:]
    halves = red[:rows // 2], red[rows // 2:], red[:, :columns // 2], red[:, columns // 2:]
    return [round(float(half.mean()), 1) for half in halves]


@pytest.mark.parametrize(("orientation", "expected"), [
    (1, [1, 0, 0.5, 0.5]), (3, [0, 1, 0.5, 0.5]), (4, [0, 1, 0.5, 0.5]), (6, [0.5, 0.5, 0, 1]), (8, [0.5, 0.5, 1, 0])])
def test_photos_are_turned_as_they_were_taken(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    half_and_half(48, 48).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert sides(read_frames([tmp_path / "a.jpg"], 32, 32)[0, :, 0]) == expected


@pytest.mark.parametrize(("degrees", "expected"), [(0, [1, 0, 0.5, 0.5]), (90, [0.5, 0.5, 1, 0]), (180, [0, 1, 0.5, 0.5]),
                                                   (270, [0.5, 0.5, 0, 1])])
def test_videos_are_turned_as_they_were_taken(tmp_path, degrees, expected):
    """A phone writes a matrix into the head of its file and leaves the frames as the sensor had them; it turns against the clock."""
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, 16, quality=1)
    writer.write(torch.from_numpy(np.array(half_and_half(64, 48)))[None].repeat(3, 1, 1, 1))
    writer.close()
    data = path.read_bytes()
    cos, sin = {0: (1, 0), 90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]
    plain, turned = ([(number << shift) & 0xFFFFFFFF for number, shift in zip(matrix, (16, 16, 30) * 3)]
                     for matrix in ((1, 0, 0, 0, 1, 0, 0, 0, 1), (cos, sin, 0, -sin, cos, 0, 0, 0, 1)))
    plain, turned = (b"".join(number.to_bytes(4, "big") for number in matrix) for matrix in (plain, turned))
    at = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + 36:])
    assert sides(read_frames([path], 32, 32)[0, :, 2]) == expected


@pytest.mark.parametrize(("width", "height"), [(96, 32), (32, 96), (33, 95)])
def test_pictures_are_cropped_not_squeezed(tmp_path, width, height):
    """A circle in the middle stays a circle, and what lies beyond the frame's shape is cut off."""
    y, x = np.mgrid[:height, :width]
    circle = (((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2) < 12 ** 2) * np.uint8(255)
    Image.fromarray(circle).save(tmp_path / "a.png")
    shown = read_frames([tmp_path / "a.png"], 32, 32)[0, 0, 0] > 0
    rows, columns = (int(shown.any(axis).sum()) for axis in (1, 0))
    assert abs(rows - columns) <= 1 and abs(rows - 24) <= 2


def test_pictures_of_all_kinds(tmp_path):
    """Grey, with a palette, transparent, with 16 bits a channel: bright stays bright."""
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        grey = Image.new("L", (40, 40), 128)
        (Image.fromarray(np.full((40, 40), 128 * 257, np.uint16)) if mode == "I;16" else grey.convert("RGB").convert(mode)).save(path)
        assert float(read_frames([path], 32, 32).mean()) == pytest.approx(0, abs=0.03), mode


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0\x00\x10JFIF", bytes(1000)])
def test_damaged_pictures_are_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"/a\.png cannot be read as an image or a video|/a\.png holds no picture"):
        read_frames([path], 32, 32)
    with pytest.raises(ValueError, match="cannot be read"):
        read_frames([tmp_path], 32, 32)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*/b\.png"):
        read_frames([tmp_path / "b.png"], 32, 32)
