"""Camera paths against the original's own functions, and what is refused.

tests/data/worldplay_cameras.safetensors holds, under text.*, what the original made of moves (of `together`, its trajectory function, which
takes several motions at once where its text does not), and under poses.* what it read from a file of random cameras.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.video.camera_file import read_poses, write_poses
from comfyui_qvg.qvg.video.camera_moves import KEYS, PRESETS, Pace, parse_moves, preset, walk
from comfyui_qvg.qvg.video.cameras import FOCAL, CameraPath, action_words, inverse, video_cameras

K = [[960.0, 0, 960], [0, 960, 540], [0, 0, 1]]


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the file's metadata."""
    with safe_open(Path(__file__).parent / "data" / "worldplay_cameras.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if not key.startswith("prope.")}, file.metadata()


@pytest.mark.parametrize("name", ["plain", "turn", "together"])
def test_moves_are_the_original_s(recorded, name):
    tensors, metadata = recorded
    path = walk(metadata[f"text.{name}"])
    torch.testing.assert_close(path.cameras, tensors[f"text.{name}.cameras"], atol=1e-12, rtol=0)
    assert torch.equal(path.intrinsics, tensors[f"text.{name}.intrinsics"].expand(len(path), 3, 3))
    assert torch.equal(path.actions, tensors[f"text.{name}.actions"])


def test_labels_of_any_cameras_are_the_original_s(recorded):
    tensors, _ = recorded
    path = CameraPath.from_cameras(tensors["poses.cameras"])
    assert torch.equal(path.actions, tensors["poses.actions"]) and len(path.actions.unique()) > 30


def test_a_file_of_poses_is_the_original_s(recorded, tmp_path):
    tensors, metadata = recorded
    poses = {str(i): {"extrinsic": world, "K": json.loads(metadata["poses.K"])} for i, world in enumerate(tensors["poses.worlds"].tolist())}
    (tmp_path / "poses.json").write_text(json.dumps(poses))
    path = read_poses(tmp_path / "poses.json")
    torch.testing.assert_close(path.cameras, tensors["poses.cameras"], atol=1e-10, rtol=0)
    assert torch.equal(path.intrinsics, tensors["poses.intrinsics"].expand(len(path), 3, 3))
    assert torch.equal(path.actions, tensors["poses.actions"])


def test_conventions():
    """One latent frame of each key, and what it does: x points right, y down, z ahead; centres are in world units."""
    centres = {keys: walk(f"{keys}-1").positions()[0][1].tolist() for keys in ("w", "s", "a", "d")}
    assert centres == {"w": [0, 0, 0.08], "s": [0, 0, -0.08], "a": [-0.08, 0, 0], "d": [0.08, 0, 0]}
    views = {keys: walk(f"{keys}-30").positions()[1][-1].round(decimals=6).tolist() for keys in ("left", "right", "up", "down")}
    assert views == {"left": [-1, 0, 0], "right": [1, 0, 0], "up": [0, -1, 0], "down": [0, 1, 0]}
    path = walk("right-30, w-10")
    torch.testing.assert_close(path.positions()[0][-1], torch.tensor([0.8, 0, 0], dtype=torch.float64))
    across, down = path.field_of_view
    assert round(across, 2) == 89.42 and round(down, 2) == 58.22


def test_a_point_that_is_orbited_stays_ahead():
    path = walk("w-3, orbit-right-20, orbit-left-45", Pace(distance=2.0))
    centres, views = path.positions()
    torch.testing.assert_close((centres + 2.0 * views)[3:], torch.tensor([[0, 0, 2.24]], dtype=torch.float64).expand(66, 3))
    assert centres[23, 0] > 1.5 and action_words(int(path.actions[4])) == "right, turn left"


def test_a_pace():
    path = walk("w-1, right-1", Pace(step=0.5, turn=15))
    assert path.positions()[0][1].tolist() == [0, 0, 0.5]
    assert round(float(torch.rad2deg(torch.atan2(*path.positions()[1][2, [0, 2]]))), 9) == 15


@pytest.mark.parametrize(("text", "moves"), [
    ("w-8, right-4,s-2", [(("w",), 8), (("right",), 4), (("s",), 2)]),
    ("  W - 3 ,\n Right + w-4.0,\n", [(("w",), 3), (("right", "w"), 4)]),
    ("Orbit-Left-7, still-1, w+d+up-2", [(("orbit-left",), 7), (("still",), 1), (("w", "d", "up"), 2)])])
def test_moves_are_parsed(text, moves):
    found = parse_moves(text)
    assert found == moves and len(walk(text)) == 1 + sum(frames for _, frames in moves)


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "No moves were given"), (" ,, ", "No moves were given"), ("w8", "'w8' is no move; write a key, a dash"),
    ("w-3, x-4", "'x-4' has the key 'x'; keys are w, s"), ("w-", "'w-' is no move"), ("w+-2", "has the key ''"),
    ("w+s-2", "'w\\+s-2' holds keys together that exclude"), ("w+d+s-2", "exclude each other"), ("w+w-2", "exclude"),
    ("still+w-2", "exclude"), ("right-0.5", "'right-0.5' lasts 0.5 latent frames; give a whole number of 1 or more"),
    ("w-0", "lasts 0 latent frames"), ("w-nan", "lasts nan"), ("w-inf", "lasts inf"), ("w-9000, s-1000", "last 10000 latent frames")])
def test_wrong_moves_are_named(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        walk(text)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("pace", [Pace(), Pace(turn=15.0)])
def test_presets_have_the_frames_asked_for(name, pace):
    path = preset(name, 140, pace)
    assert len(path) == 140 and (path.actions > 0).sum() > 20
    least = PRESETS[name].least(pace) + 1
    assert len(preset(name, least, pace)) == least
    if least > 2:
        with pytest.raises(ValueError, match=f"'{name}' takes {least} latent frames at .* there are {least - 1}"):
            preset(name, least - 1, pace)


def test_presets_that_return_do():
    same = torch.eye(4, dtype=torch.float64)
    for name in ("there and back", "look around", "full turn", "square"):
        torch.testing.assert_close(preset(name, 201).cameras[-1], same, msg=name)
    centres, views = preset("return", 201).positions()
    torch.testing.assert_close(centres[-1], centres[0])
    torch.testing.assert_close(views[-1], -views[0])
    with pytest.raises(ValueError, match="no camera path 'fly'; the paths are forward"):
        preset("fly", 20)


def test_a_path_is_extended_by_movements():
    """Moves one after the other are the moves as one text, also in pieces of a chunk, and the world of the second does not matter."""
    whole = walk("w-5, right-9, a-3, up-2")
    moved = CameraPath.from_cameras(walk("a-3, up-2").cameras @ walk("down-7, w-9").cameras[-1])
    for second in (walk("a-3, up-2"), moved):
        joined = walk("w-5, right-9").extended(second)
        torch.testing.assert_close(joined.cameras, whole.cameras, atol=1e-12, rtol=0)
        assert torch.equal(joined.actions, whole.actions) and len(joined) == len(joined.intrinsics) == 20


def test_parts_keep_their_labels():
    path = walk("w-5, right-6")
    part = path[4:8]
    assert len(part) == 4 and torch.equal(part.actions, path.actions[4:8]) and part.actions[0] == 9
    held = path.resized(16)
    assert held.actions[12:].tolist() == [0] * 4 and torch.equal(held.cameras[15], path.cameras[11])
    assert torch.equal(held.actions, CameraPath.from_cameras(held.cameras).actions)
    assert torch.equal(path.resized(5).cameras, path.cameras[:5])
    with pytest.raises(ValueError, match="Frames 12 to 20 are none of the 12"):
        path[12:20]
    with pytest.raises(TypeError, match="give a range"):
        path[3]
    with pytest.raises(ValueError, match="path of 0 latent frames"):
        path.resized(0)
    with pytest.raises(ValueError, match="path of 10001 latent frames"):
        path.resized(10_000).extended(walk("w-1"))


def test_another_world_and_lens(recorded):
    path = CameraPath.from_cameras(recorded[0]["poses.cameras"])
    moved = path.from_origin()
    torch.testing.assert_close(moved.cameras[0], torch.eye(4, dtype=torch.float64))
    assert torch.equal(CameraPath.from_cameras(moved.cameras).actions, path.actions)
    wide = path.with_field_of_view(120)
    assert round(wide.field_of_view[0], 9) == 120
    torch.testing.assert_close(wide.intrinsics[0, 0, 0] / wide.intrinsics[0, 1, 1], torch.tensor(FOCAL[0] / FOCAL[1], dtype=torch.float64))
    assert wide.intrinsics[0, 0, 2] == 0.5
    with pytest.raises(ValueError, match="180 degrees; it must be 1 to 170"):
        path.with_field_of_view(180)


def test_labels_have_words():
    assert [action_words(label) for label in (0, 9, 28, 45, 8)] == [
        "still", "forward", "right, turn right", "forward right", "turn left and down"]
    assert len({action_words(label) for label in range(81)}) == 81
    with pytest.raises(ValueError, match="labels are 0 to 80"):
        action_words(81)
    for key in KEYS:
        assert (action_words(int(walk(f"{key}-1").actions[1])) == "still") == (key == "still")


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda world: world.mul_(torch.tensor([2.0, 1, 1, 1])), "Camera 2 is no rotation: its axes are off by 3 "),
    (lambda world: world[:3, 0].neg_(), "Camera 2 is a mirror image"),
    (lambda world: world[3].copy_(torch.tensor([1.0, 2, 3, 1])), r"Camera 2 has the last row \[1.0, 2.0, 3.0, 1.0\]; it must be 0"),
    (lambda world: world[0, 3].fill_(torch.nan), "not finite|is nan")])
def test_wrong_cameras_are_named(change, sentence, tmp_path):
    worlds = inverse(walk("w-4, right-2").cameras)
    change(worlds[2])
    (tmp_path / "p.json").write_text(json.dumps({str(i): {"extrinsic": world, "K": K} for i, world in enumerate(worlds.tolist())}))
    with pytest.raises(ValueError, match=sentence):
        read_poses(tmp_path / "p.json")
    if "nan" in sentence or "last row" in sentence or "mirror" in sentence:
        with pytest.raises(ValueError, match="Camera 2"):
            CameraPath.from_cameras(inverse(worlds) if "row" not in sentence else worlds)


@pytest.mark.parametrize(("content", "sentence"), [
    ("{", "p.json is no file of cameras: Expecting"), ("[]", "cameras is \\[\\]; it must be an object"), ("{}", "holds 0 cameras"),
    ('{"0": {"K": 1}}', "lacks its field extrinsic"),
    ('{"0": {"extrinsic": [[1]], "K": []}}', r"extrinsic is \[\[1\]\]; it must be a list of 4"),
    ('{"0": 1, "0": 2}', "names something twice"), ("[" * 50_000, "nested too deeply"),
    (b"\xff\xfe{}", "no file of cameras")])
def test_files_of_other_kinds_are_refused(content, sentence, tmp_path):
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        read_poses(tmp_path / "p.json")


def test_names_and_lenses_of_a_file_are_checked(tmp_path):
    pose = {"extrinsic": torch.eye(4).tolist(), "K": K}
    for poses, sentence in (({"0": pose, "2": pose}, "It has no camera '1' but a camera '2'; name its 2 cameras 0 to 1"),
                            ({"a": pose}, "It has no camera '0' but a camera 'a'"),
                            ({"0": pose | {"K": [[9, 0, 0], [0, 9, 1], [0, 0, 1]]}}, r"Camera 0 has its principal point at \[0.0, 1.0\]"),
                            ({"0": pose | {"K": [[-9, 0, 2], [0, 9, 1], [0, 0, 1]]}}, "Camera 0 has the focal lengths -2.25, 4.5")):
        (tmp_path / "p.json").write_text(json.dumps(poses))
        with pytest.raises(ValueError, match=sentence):
            read_poses(tmp_path / "p.json")


def test_cameras_are_numbered_not_listed(tmp_path):
    """A file may list its cameras in another order than they are numbered, as names sorted by letter are."""
    worlds = inverse(walk("w-12").cameras).tolist()
    (tmp_path / "p.json").write_text(json.dumps({str(i): {"extrinsic": worlds[i], "K": K} for i in sorted(range(13), key=str)}))
    torch.testing.assert_close(read_poses(tmp_path / "p.json").cameras, walk("w-12").cameras)


def test_paths_are_written(recorded, tmp_path):
    path = CameraPath.from_cameras(recorded[0]["poses.cameras"]).with_field_of_view(60)
    write_poses(path, tmp_path / "p.json", (832, 480))
    again = read_poses(tmp_path / "p.json")
    torch.testing.assert_close(again.cameras, path.cameras, atol=1e-10, rtol=0)
    torch.testing.assert_close(again.intrinsics, path.intrinsics)
    assert torch.equal(again.actions, path.actions)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda cameras, intrinsics: intrinsics[1, 0, 0].fill_(1e-30), "Camera 1 has the focal lengths 1e-30"),
    (lambda cameras, intrinsics: intrinsics[2, 1, 1].fill_(500), "Camera 2 has the focal lengths"),
    (lambda cameras, intrinsics: cameras[3, 0, 3].fill_(1e30), "Camera 3 is 1e\\+30 world units away; 100000 is the most")])
def test_what_no_lens_has_and_no_walk_reaches_is_refused(change, sentence):
    path = walk("w-3")
    cameras, intrinsics = path.cameras.clone(), path.intrinsics.clone()
    change(cameras, intrinsics)
    with pytest.raises(ValueError, match=sentence):
        CameraPath.from_cameras(cameras, intrinsics)


def test_cameras_of_video_frames():
    for keys in ("w", "right", "up", "d"):
        fine = walk(f"{keys}-12", Pace(step=0.02, turn=0.75)).cameras
        torch.testing.assert_close(video_cameras(walk(f"{keys}-3").cameras), fine, atol=1e-12, rtol=0)
    path = walk("w+right-5, up+left-4, still-2, orbit-left-3", Pace(step=0.15, turn=15.0))
    filled = video_cameras(path.cameras)
    assert len(filled) == 4 * len(path) - 3
    torch.testing.assert_close(filled[::4], path.cameras, atol=1e-12, rtol=0)
    steps = (filled[1:] @ inverse(filled[:-1]))[:, :3, :3].unflatten(0, (-1, 4))
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-10, rtol=0)
    assert len(CameraPath.from_cameras(filled)) == 57
    assert len(video_cameras(path.cameras[:1])) == 1
    other = walk("w+right-5, up+left-4, still-2, orbit-right-3", Pace(turn=7.0)).cameras
    both = video_cameras(torch.stack([path.cameras, other]))
    assert torch.equal(both[0], filled) and torch.equal(both[1], video_cameras(other))
