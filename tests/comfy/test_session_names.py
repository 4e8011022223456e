"""Where the session nodes write and read, in the real ComfyUI."""

import pytest


@pytest.fixture
def session(comfy_modules, tmp_path, monkeypatch):
    import folder_paths

    from comfyui_qvg.nodes import session

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return session


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "../escape", "/etc/passwd", "a\0b"])
def test_names_that_leave_the_folder(session, name, existing):
    with pytest.raises(ValueError, match="Use a plain name"):
        session.path_of(name, existing)
    assert not session.folder().exists()


def test_a_link_that_leaves_the_folder(session, tmp_path):
    session.folder().mkdir(parents=True)
    (session.folder() / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of"):
        session.path_of("link/a")


def test_a_plain_name_lies_below_the_folder(session):
    assert session.path_of("films/my video") == session.folder() / "films" / "my video.safetensors"
    assert session.path_of("take: two", existing=True) == session.folder() / "take: two.safetensors"
