"""Camera Path (QVG) in the real ComfyUI: paths, their pictures, what is said of them and what is refused."""

import uuid

import pytest
import torch
from PIL import Image

from comfy_client import ComfyError, Graph
from comfyui_qvg.qvg.report.top_view import draw_top_view
from comfyui_qvg.qvg.video.camera_file import write_poses
from comfyui_qvg.qvg.video.camera_moves import PRESETS, Pace, preset, walk


def add(graph, name, **inputs):
    return graph.add(name, "QVGCameraPath", **({"source": "moves", "moves": "w-8, right-4, w-3", "frames": 0} | inputs))


def run(comfy, graph, last="path"):
    """(latent frames, the picture, the text) of one node."""
    graph.add("count", "PreviewAny", source=[last, 1])
    graph.add("save", "SaveImage", images=[last, 2], filename_prefix="top_view")
    outputs = comfy.run(graph)
    picture = Image.open(comfy.output_path(outputs["save"]["images"][0])).convert("RGB")
    shown = outputs[last]["images"][0]
    assert shown["type"] == "temp" and Image.open(comfy.output_path(shown)).convert("RGB").tobytes() == picture.tobytes()
    return int(outputs["count"]["text"][0]), picture, outputs[last]["qvg_text"][0]


def drawn(path):
    return draw_top_view(*path.positions()).tobytes()


@pytest.fixture
def node(comfy_modules):
    from comfyui_qvg.nodes import camera_path

    return camera_path


def executed(node, **inputs):
    """(path, frames) of the node in this process, where its path can be looked at. The picture goes to ComfyUI's folder of previews."""
    return node.QVGCameraPath.execute(**({"source": "moves", "moves": "", "frames": 0} | inputs)).args[:2]


@pytest.fixture
def previews(node, tmp_path, monkeypatch):
    monkeypatch.setattr(node.folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(node.folder_paths, "input_directory", str(tmp_path))
    return tmp_path


def assert_same(found, expected):
    assert torch.equal(found.cameras, expected.cameras) and torch.equal(found.actions, expected.actions)
    assert torch.equal(found.intrinsics, expected.intrinsics)


def test_moves_become_a_path_a_picture_and_times(comfy):
    graph = Graph()
    add(graph, "path")
    frames, picture, text = run(comfy, graph)
    assert frames == 16 and picture.tobytes() == drawn(walk("w-8, right-4, w-3"))
    assert text == ("16 latent frames: 4 chunks of four\n61 video frames: 3.8 s at 16 fps (5B), 2.5 s at 24 fps (8B)")


def test_paths_join_and_take_their_length(comfy):
    """A second node continues the first, and both together are what their moves are in one text."""
    graph = Graph()
    first = add(graph, "first", moves="w-5\nright-4", step=0.2, turn=10.0)
    add(graph, "path", moves="w-2", path=first, step=0.2, turn=10.0)
    frames, picture, text = run(comfy, graph)
    pace = Pace(0.2, 10.0)
    joined = walk("w-5, right-4", pace).extended(walk("w-2", pace))
    assert torch.allclose(joined.cameras, walk("w-5, right-4, w-2", pace).cameras)
    assert frames == 12 and picture.tobytes() == drawn(joined)
    assert text.startswith("12 latent frames: 3 chunks of four\n45 video frames")


@pytest.mark.parametrize("name", PRESETS)
def test_paths_with_a_name(node, previews, name):
    """Of a wanted length, and of one that is whole chunks and long enough."""
    wanted = PRESETS[name].least(Pace()) + 8
    assert_same(executed(node, source=name, frames=wanted)[0], preset(name, wanted))
    path, frames = executed(node, source=name)
    assert frames == len(path) == {"full turn": 124, "square": 144, "return": 80}.get(name, 16)


def test_a_named_path_continues_another(node, previews):
    first, _ = executed(node, moves="w-8, right-30")
    path, frames = executed(node, source="orbit", frames=60, path=first, distance=2.0)
    assert frames == 60
    assert_same(path, first.extended(preset("orbit", 22, Pace(distance=2.0))))
    assert executed(node, source="orbit", path=first)[1] == 56


def test_a_length_cuts_or_waits(node, previews):
    whole = walk("w-8, right-4")
    assert_same(executed(node, moves="w-8, right-4", frames=6)[0], whole[:6])
    assert_same(executed(node, moves="w-8, right-4", frames=20)[0], walk("w-8, right-4, still-7"))


@pytest.mark.parametrize(("frames", "first_line", "video"), [
    (1, "1 latent frame and 3 of standing still: 1 chunk of four", 13), (4, "4 latent frames: 1 chunk of four", 13),
    (17, "17 latent frames and 3 of standing still: 5 chunks of four", 77)])
def test_what_is_said_of_lengths(node, frames, first_line, video):
    first, second = node.describe(frames).split("\n")
    assert first == first_line and second.startswith(f"{video} video frames: {video / 16:.1f} s at 16 fps")


def test_a_file_of_poses_and_its_cache(comfy, comfy_server):
    """As written by `write_poses`; run again when the content changes, and not otherwise."""
    file = comfy_server.folder("input") / "poses.json"
    write_poses(walk("w-3, left-4"), file)
    assert "poses.json" in comfy.object_info("QVGCameraPath")["QVGCameraPath"]["input"]["optional"]["file"][1]["options"]
    graph = Graph()
    add(graph, "path", source="file", file="poses.json")
    frames, picture, _ = run(comfy, graph)
    assert frames == 8 and picture.tobytes() == drawn(walk("w-3, left-4"))

    def cached():
        comfy.messages.clear()
        found = run(comfy, graph)
        return "path" in [name for message in comfy.of_type("execution_cached") for name in message["nodes"]], found

    assert cached() == (True, (frames, picture, _))
    content = file.read_text()
    file.write_text(content)
    assert cached()[0], "the same content at another time was read anew"
    write_poses(walk("d-3, up-8"), file)
    again, (frames, picture, _) = cached()
    assert not again and frames == 12 and picture.tobytes() == drawn(walk("d-3, up-8"))


@pytest.mark.parametrize(("inputs", "words"), [
    ({"moves": ""}, r"No moves were given; write keys and latent frames, such as \"w-8, right-4, s-2\"\."),
    ({"moves": "w-8, q-3"}, "'q-3' has the key 'q'; keys are w, s, a"),
    ({"moves": "w-0.5"}, "'w-0.5' lasts 0.5 latent frames; give a whole number of 1 or more"),
    ({"source": "full turn", "frames": 40}, "'full turn' takes 121 latent frames at 3 degrees a frame, and there are 40"),
    ({"source": "orbit", "frames": 12, "path": True}, "to continue has 16 latent frames already; set frames above that, or to 0"),
    ({"source": "file"}, "No file of poses is chosen; copy one to .* and choose it in file, or set source to moves"),
    ({"source": "file", "file": "broken.json"}, "broken.json is no file of cameras: ")])
def test_refusals_are_one_sentence(comfy, comfy_server, inputs, words):
    (comfy_server.folder("input") / "broken.json").write_text('{"0": {"extrinsic": 5}}')
    graph = Graph()
    if inputs.get("path"):
        inputs = inputs | {"path": add(graph, "first")}
    add(graph, "path", **inputs)
    with pytest.raises(ComfyError, match=words) as refusal:
        comfy.run(graph)
    assert refusal.value.details["exception_message"].strip().count("\n") == 0
    assert refusal.value.details["node_id"] == "path"


def test_no_name_leads_out_of_the_input_folder(node, previews, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "poses.json"
    write_poses(walk("w-3"), elsewhere)
    (previews / "link.json").symlink_to(elsewhere)
    for name in (str(elsewhere), f"../{elsewhere.parent.name}/poses.json", "link.json", "absent.json"):
        with pytest.raises(ValueError, match=r"There is no file|The name .* Use a plain name"):
            node.path_of(name)


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes 2.0"])
def test_the_node_shows_its_path(page, comfy, modern, tmp_path_factory):
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", modern)
    page.wait_for_timeout(500)
    page.evaluate("async graph => { await app.loadGraphData(graph, true, true) }",
                  {"id": str(uuid.uuid4()), "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4})
    page.evaluate("""() => {
      const node = LiteGraph.createNode('QVGCameraPath')
      node.pos = [100, 200]
      app.rootGraph.add(node)
      node.widgets.find(widget => widget.name === 'source').value = 'return'
    }""")
    page.evaluate("app.queuePrompt(0, 1)")
    try:
        page.wait_for_function("app.rootGraph.nodes[0].qvgText?.root?.innerText.includes('80 latent frames: 20 chunks')")
        page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(2000)
        page.screenshot(path=tmp_path_factory.getbasetemp() / f"camera path {'modern' if modern else 'classic'}.png")
        # the preview: an element in Nodes 2.0, drawn on the canvas before
        seen = ("[...document.querySelectorAll('[data-node-id] img')].some(image => image.naturalWidth === 640)" if modern else
                "app.rootGraph.nodes[0].imgs?.[0]?.naturalWidth === 640")
        page.wait_for_function(seen)
        errors = [text for kind, text in page.console if kind in ("error", "pageerror") and "qvg" in text.lower()]
        assert errors == []
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.wait_for_timeout(300)
