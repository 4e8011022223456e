"""A saved graph opens for ever: no id, input or output changes without somebody having said so."""

import json

from interface import FILE, interface


def test_nothing_changed_unseen(comfy):
    written, found = json.loads(FILE.read_text()), interface(comfy)
    assert found == written, "the nodes' interface changed: if that is wanted, run python tests/comfy/interface.py and tell CHANGELOG.md"


def test_ids_are_ours_and_kept(comfy):
    gone = set(json.loads(FILE.read_text())) - set(comfy.object_info())
    assert gone == set(), "graphs with these nodes no longer open"
