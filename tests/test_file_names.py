"""Names that people type: kept below their folder, and the same on every system."""

import pytest

from comfyui_qvg.qvg.files.file_names import LONGEST, TEMPORARY, relative_path

OUTSIDE = ["", " ", ".", "..", "...", "a/..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", "./a", "~/a", "a\0b", "a\nb", "a/ /b",
           "\ud800"]
UNPORTABLE = ["C:", "C:a", "C:/a", "..\\a", "\\\\host\\share", "a\\b", "what?", "a*", 'a"b', "a<b", "a|b", "a./b", "a /b",
              "CON", "con.safetensors", "films/nul", "Com1.x", "lpt9"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(name, existing):
    with pytest.raises(ValueError, match=r"Use a plain name"):
        relative_path(name, ".safetensors", existing)


@pytest.mark.parametrize("name", UNPORTABLE)
def test_a_new_file_has_a_name_for_every_system(name):
    with pytest.raises(ValueError, match=r"Use a plain name"):
        relative_path(name, ".safetensors")


@pytest.mark.parametrize("name", ["a.", "a ", "a . "])
def test_what_some_systems_drop_is_refused_where_it_ends_the_name(name):
    """Before an ending it stays."""
    assert str(relative_path(name, ".png")) == f"{name}.png"
    with pytest.raises(ValueError, match="which some systems drop"):
        relative_path(name)


@pytest.mark.parametrize("name", ["take: two", "what?", "a.", "con"])
def test_a_file_that_is_there_keeps_its_name(name):
    assert str(relative_path(name, ".safetensors", existing=True)) == f"{name}.safetensors"


@pytest.mark.parametrize("name", ["my video", "films/my video", "v1.2", "Übung", "動画\u3000一", ".hidden", "console", "a..b"])
def test_plain_names(name):
    assert str(relative_path(name, ".safetensors")) == f"{name}.safetensors"
    assert str(relative_path(f"{name}.safetensors", ".safetensors")) == f"{name}.safetensors"


def test_room_for_the_name_of_a_file_that_is_being_written():
    longest = LONGEST - len(".safetensors") - TEMPORARY
    assert relative_path(longest * "a", ".safetensors")
    for name in ((longest + 1) * "a", 84 * "動", f"{300 * 'a'}/b"):
        with pytest.raises(ValueError, match="too long"):
            relative_path(name, ".safetensors")
