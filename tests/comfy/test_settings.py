"""QVG Settings: what its inputs make of a preset, in the process itself."""

import re
from dataclasses import replace

import pytest

from comfy_paths import REPOSITORY
from comfyui_qvg.qvg.codec.qvg import QVGCodec
from comfyui_qvg.qvg.settings import CODECS, PRESETS, QVGSettings, TensorSettings


@pytest.fixture(scope="module")
def node(comfy_modules):
    from comfyui_qvg.nodes import kv_cache

    return kv_cache


@pytest.fixture
def changed(node):
    return lambda preset, **knobs: node.QVGSettingsNode.execute(preset, **knobs).args[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_itself_and_what_its_inputs_say(node, changed, name):
    unset = {option.id: option.default for option in node.QVGSettingsNode.define_schema().inputs if option.id != "preset"}
    assert changed(name.capitalize(), **unset) == changed(name.capitalize()) == PRESETS[name]
    assert changed(name.capitalize(), **node.values_of(PRESETS[name])) == PRESETS[name]


def test_every_shown_value_can_be_chosen(node):
    """But the codec of Off, which is no choice: 8 and 16 bits are the same with every codec."""
    options = {option.id: option.options for option in node.QVGSettingsNode.define_schema().inputs if hasattr(option, "options")}
    for name, settings in PRESETS.items():
        shown = node.values_of(settings)
        assert all(shown[knob] in options[knob] for knob in options.keys() & shown.keys() if (name, knob) != ("off", "codec"))
    assert options["codec"] == ["preset", "transform", "qvg", "paper"]


def test_codecs_of_other_packs(node, changed):
    """Are offered with their own bits, if they hold fewer than any codec can."""
    class Other(QVGCodec):
        name, widths = "other", (16, 8, 3.5)

    class Exact(QVGCodec):
        name, widths = "exact", (16,)

    for codec in (Other(), Exact()):
        CODECS.register(codec)
    try:
        options = {option.id: option.options for option in node.QVGSettingsNode.define_schema().inputs if hasattr(option, "options")}
        assert "other" in options["codec"] and "exact" not in options["codec"]
        assert options["key_bits"][-4:] == ["3.5", "4", "8", "16"]
        found = changed("Quality", codec="other", key_bits="3.5", value_bits="3.5", sink_bits="8", recent_frames=0)
        assert (found.codec, found.key.bits) == ("other", 3.5)
    finally:
        CODECS.remove("other")
        CODECS.remove("exact")


def test_fractions_of_a_bit(changed):
    found = changed("Tiny", key_bits="1.25", value_bits="0.75", sink_bits="2.5", recent_bits="8")
    assert (found.key.bits, found.value.bits, found.sink_bits, found.recent_bits) == (1.25, 0.75, 2.5, 8)
    assert QVGSettings.from_json(found.to_json()) == found and isinstance(found.recent_bits, int)


def test_another_codec(changed):
    """Its codebooks are those of a new `TensorSettings` where the preset's codec has none, unless they are set, too."""
    tiny = PRESETS["tiny"]
    assert changed("Tiny", codec="transform", stages=-1) == tiny
    found = changed("Tiny", codec="qvg", key_bits="2", value_bits="1", centroids=64)
    assert (found.codec, found.sink_frames, found.sink_bits) == ("qvg", tiny.sink_frames, tiny.sink_bits)
    assert found.key == replace(TensorSettings(), bits=2, centroids=64, gain=tiny.key.gain) and found.value.bits == 1
    assert changed("Quality", codec="transform").codec == "transform"


@pytest.mark.parametrize(("preset", "knobs", "words"), [
    ("Tiny", {"codec": "qvg"}, r"key is to hold 0\.5 bits, but the qvg codec holds 1, 2, 3, 4, 8, 16; choose one of"),
    ("Tiny", {"codec": "qvg", "key_bits": "1"}, r"value is to hold 0\.5 bits"),
    ("Paper", {"key_bits": "1.25"}, r"stores 2 or 4 bits, not 1\.25; choose 2 or 4, or the qvg codec"),
    ("Paper", {"sink_frames": 3, "sink_bits": "2.5"}, r"cannot hold a sink in 2\.5 bits; choose 2, 4, 8 or 16"),
    ("Quality", {"codec": "paper", "key_bits": "2", "value_bits": "2"}, "set recent_frames to 0, or recent_bits to 8 or 16"),
    ("Off", {"value_bits": "2"}, "value is to hold 2 bits, but .* holds 8 or 16 alone; choose one of them, or another preset")])
def test_what_a_codec_cannot_do_is_said(changed, preset, knobs, words):
    with pytest.raises(ValueError, match=words):
        changed(preset, **knobs)


def test_the_help_page_names_the_bits():
    """Of old, first and newest frames, as they are in `PRESETS`."""
    page = " ".join((REPOSITORY / "web" / "docs" / "QVGSettings.md").read_text().split())
    for name, settings in PRESETS.items():
        (line,) = re.findall(rf"- \*\*{name.capitalize()}\*\*(.*?)(?= - \*\*| A frame )", page)
        bits = {settings.key.bits, settings.value.bits}
        bits |= {settings.sink_bits} if settings.sink_frames else set()
        bits |= {settings.recent_bits} if settings.recent_frames else set()
        found = {float(number) for number in re.findall(r"in (\d+(?:\.\d+)?)(?: bits?)?[ ,.]", line)}
        assert found == (bits if name != "off" else set()), line
