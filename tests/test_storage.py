"""Sessions: going on bit for bit, damaged files, false headers, full disks."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler, guided
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.session import SessionError

SHAPE = (1, 16, 2, 4)
RUN = Run(frames=12, sigmas=(1, 0.5, 0), recache_frames=3)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CausalWan(WanSizes(dim=256, ffn_dim=32, layers=2, text_dim=8)).requires_grad_(False).eval()


def sampler(network, settings, run=RUN, shape=SHAPE, cfg=1.0):
    prompts = [network.project_context(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    caches = [KVCache(settings, layers=2, heads=2, head_dim=128, grid=(1, 2), rope=Rope, batch=shape[0], dtype=torch.float32,
                      max_frames=run.frames)
              for _ in range(1 + (cfg != 1))]
    conditions = [Condition(prompts[0], caches[0])] if cfg == 1 else guided(prompts[0], caches[0], prompts[1], caches[1], cfg)
    return Sampler(CachedNetwork(network, conditions), run, shape)


def go(made, stop=None):
    """Latents that the sampler makes up to a frame."""
    parts = []
    for event in made:
        if isinstance(event, ChunkDone):
            parts.append(event.latents)
            if made.frames_done == stop:
                break
    return torch.cat(parts, 2)


SETTINGS = {name: PRESETS[name].both(centroids=4) for name in PRESETS} | {
    "window": replace(PLANES["balanced"].both(centroids=4), window_frames=3, sink_frames=1, codebook_frames=3),
    "recent plain": replace(PLANES["balanced"].both(centroids=4), recent_bits=16, sink_frames=0),
    "fractions": replace(PRESETS["tiny"], key=TensorSettings(bits=1.25), value=TensorSettings(bits=0.75), sink_bits=2.5, recent_bits=1.75),
    "asymmetric paper": PRESETS["paper"].both(centroids=4, symmetric=False),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_resumed_run_is_the_run_that_never_stopped(network, tmp_path, monkeypatch, name, cfg):
    if cfg != 1:
        # as a video of an hour is written
        monkeypatch.setattr(storage, "MOST_HEADER_BYTES", 0)
    whole = go(sampler(network, SETTINGS[name], cfg=cfg))
    first = sampler(network, SETTINGS[name], cfg=cfg)
    made = go(first, 6)
    storage.save(tmp_path / "a.safetensors", first, fingerprint=storage.fingerprint(network), latents=made, extra={"fps": 16})

    session = storage.load(tmp_path / "a.safetensors")
    second = sampler(network, session.settings[0], session.run, session.shape, cfg=cfg)
    session.restore(second, storage.fingerprint(network))
    assert torch.equal(session.latents, made) and session.extra == {"fps": 16}
    assert second.model.stats().by_kind == first.model.stats().by_kind
    assert torch.equal(torch.cat([made, go(second)], 2), whole)
    # and the two runs leave the same session behind
    last = sampler(network, SETTINGS[name], cfg=cfg)
    go(last)
    for number, ended in enumerate((last, second)):
        storage.save(tmp_path / f"{number}.safetensors", ended, fingerprint="")
    ends = [storage.load(tmp_path / f"{number}.safetensors").stored for number in range(2)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_finished_video_can_be_made_longer(network, tmp_path):
    settings = SETTINGS["balanced"]
    short = sampler(network, settings)
    made = go(short)
    storage.save(tmp_path / "a.safetensors", short, fingerprint="x")
    session = storage.load(tmp_path / "a.safetensors")
    longer = sampler(network, settings, replace(session.run, frames=18))
    session.restore(longer, "x")
    assert torch.equal(torch.cat([made, go(longer)], 2), go(sampler(network, settings, replace(RUN, frames=18))))


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("sessions") / "good.safetensors"
    made = sampler(network, SETTINGS["window"])
    latents = go(made, 6)
    storage.save(path, made, fingerprint="x", latents=latents)
    return path


def rewrite(source, target, header=None, tensors=None, sign=True):
    """A copy of a session with another header or other tensors and, with `sign`, checksums that agree."""
    with safe_open(source, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        fields = json.loads(file.metadata()[storage.HEADER])
    (tensors or (lambda stored: None))(stored)
    fields["tensors"] = {name: [str(x.dtype), list(x.shape), hashlib.sha256(storage._bytes(x)).hexdigest()] for name, x in stored.items()}
    (header or (lambda fields: None))(fields)
    text = json.dumps(fields)
    digest = hashlib.sha256(text.encode()).hexdigest() if sign else "0"
    save_file(stored, target, {storage.HEADER: text, storage.DIGEST: digest})


def damaged(good, draw, number):
    """The bytes of a file cut short, with a bit or a byte changed, or a piece taken out, doubled, or replaced."""
    header_end = 8 + int.from_bytes(good[:8], "little")
    data = bytearray(good)
    while data == good:
        # half of all damage goes to the header, where what a file claims is decided
        at, length = draw.randrange(header_end) if number % 2 else draw.randrange(len(data)), draw.randrange(1, 64)
        kind = number // 2 % 6
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at] = (data[at] + draw.randrange(1, 256)) % 256
        elif kind == 3:
            del data[at:at + length]
        elif kind == 4:
            data[at:at] = data[at:at + length]
        else:
            data[at:at + length] = draw.randbytes(length)
    return data


def leaves(value, path=()):
    """(path, value) of every plain value in what a JSON text holds."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, part in pairs for leaf in leaves(part, (*path, key))]
    return found or [(path, value)]


# what a resumed run can have otherwise: other lengths and seeds, and what the caller keeps
FREE = {"extra", "version", "fingerprint", "last_prompt", "peaks", "chunk"}


def falsified(fields, draw):
    """One value of a header replaced by one that cannot be right."""
    path, before = draw.choice([leaf for leaf in leaves(fields) if leaf[0][0] not in FREE])
    values = ["x", [], {}] if path[0] == "run" else ["x", None, [], {}, -1, 10**12, 1.5, "../../etc/passwd"]
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = draw.choice([value for value in values if value != before])


def test_a_thousand_damaged_files(saved, network, tmp_path):
    """600 with damaged bytes, 100 of another version, 300 whose header is signed and false: each is refused with a sentence, and the
    sampler is as it was before."""
    good, draw = saved.read_bytes(), random.Random(0)
    path, target, refused = tmp_path / "bad.safetensors", sampler(network, SETTINGS["window"]), 0
    for number in range(1000):
        if number < 600:
            path.write_bytes(damaged(good, draw, number))
        elif number < 700:
            version = draw.choice([None, "1", 0, -1, 1.5, [], {}, *range(2, 99)])
            rewrite(saved, path, lambda fields, version=version: fields.update(version=version))
        else:
            rewrite(saved, path, lambda fields: falsified(fields, draw))
        with pytest.raises(SessionError, match=r"bad\.safetensors.*\.$"):
            storage.load(path).restore(target, "x")
        assert target.frames_done == 0 and not any(layer.entries for cache in target.model.caches for layer in cache.layers)
        refused += 1
    assert refused == 1000


def entry(fields):
    return fields["layers"][0][0]["entries"][0]


def state(fields):
    return fields["layers"][0][0]


def put(name, **changes):
    """Puts a value into a tensor: at=index into its flat elements, to=value."""
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[changes.get("at", 0)] = changes["to"]
    return change


def reshape(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]).clone()})


NAN, INF = float("nan"), float("inf")
HOSTILE = {
    "another version": (lambda f: f.update(version=99), None, "version 99"),
    "no version": (lambda f: f.pop("version"), None, "version None"),
    "version true": (lambda f: f.update(version=True), None, r"header.version is True; it must be"),
    "huge frames": (lambda f: entry(f).__setitem__(1, 10**12), None, r"layers\[0\]\[0\]\.entries\[0\]\[1\] is 1000000000000"),
    "negative frames": (lambda f: entry(f).__setitem__(1, -3), None, r"entries\[0\]\[1\] is -3"),
    "no tensor of that name": (lambda f: state(f)["entries"].append([6, 3, 2, 2, 0, 1]), None, "last frame of its spans"),
    "a plane more": (lambda f: entry(f).__setitem__(2, 7), None, r"key bits of cache0\.0\.entries\[0\] is 7"),
    "spans out of order": (lambda f: state(f)["entries"].reverse(), None, "where the span before it ends"),
    "spans over each other": (lambda f: state(f)["entries"][1].__setitem__(0, 0), None, "first frame of"),
    "a span across the end of the sinks": (lambda f: entry(f).__setitem__(1, 2), None, "below sink_frames, 1"),
    "position elsewhere": (lambda f: f.update(frames_done=9), None, r"\[1, 16, 6, 2, 4\]; it must be \[1, 16, 9, 2, 4\]|it must be 9"),
    "more made than there will be": (lambda f: f["run"].update(frames=3), None, "at most header.run.frames, 3"),
    "a run without end": (lambda f: f["run"].update(frames=10**9), None, r"header.run.frames is 1000000000"),
    "chunks of any length": (lambda f: f["run"].update(chunk_frames=10**6), None, "header.run.chunk_frames is 1000000"),
    "a seed of another type": (lambda f: f["run"].update(seed=1.0), None, "header.run.seed is 1.0"),
    "sigmas that are no numbers": (lambda f: f["run"].update(sigmas=[1, NAN, 0]), None, r"header.run.sigmas\[1\] is nan"),
    "more chunks than frames": (lambda f: f.update(chunk=7), None, "header.chunk is 7"),
    "settings from nowhere": (lambda f: f.update(settings=["{}"]), None,
                              r"header.settings\[0\] cannot be read: These settings have version"),
    "settings out of range": (lambda f: f.update(settings=[f["settings"][0].replace('"iterations": 8', '"iterations": 800')]), None,
                              "iterations is 800"),
    "settings of another type": (lambda f: f.update(settings=[f["settings"][0].replace('"sink_bits": 4', '"sink_bits": "4"')]), None,
                                 "sink_bits is '4'"),
    "a key of settings that is a list": (lambda f: f.update(settings=['{"version": 1, "key": []}']), None, "not a JSON object"),
    "unknown run field": (lambda f: f["run"].update(shell="rm"), None, "header.run has a field 'shell'"),
    "a run field missing": (lambda f: f["run"].pop("noise"), None, "header.run lacks its field noise"),
    "fewer layers": (lambda f: f["layers"][0].pop(), None, "a list of 2 layers"),
    "more layers than there are": (lambda f: f["geometry"][0].update(layers=10**9), None, "layers is 1000000000"),
    "tokens as many as one likes": (lambda f: f["geometry"][0].update(grid=[60_000, 60_000]), None, r"grid is \[60000, 60000\]"),
    "another batch": (lambda f: f["geometry"][0].update(batch=2), None, "batch is 2; it must be 1"),
    "entries are text": (lambda f: state(f).update(entries="abc"), None, "entries is 'abc'"),
    "a codebook missing": (lambda f: entry(f).__setitem__(4, None), None, "key codebook"),
    "one codebook for both": (lambda f: entry(f).__setitem__(5, entry(f)[4]), None, "lacks|nothing needs|both key and value"),
    "a number type that there is not": (lambda f: f.update(dtype="torch.int64"), None, "header.dtype is 'torch.int64'"),
    "recent frames that are not there": (lambda f: f.update(recent=5), None, "lacks recent"),
    "an id beyond the codebook": (None, lambda t: t["cache0.1.1.key.ids"].fill_(255), "key.ids holds 255, but its codebook has"),
    "a plane too short": (None, reshape("cache0.0.1.key.plane0", lambda x: x[:-1]), r"shape of cache0\.0\.1\.key\.plane0"),
    "a tensor that nothing needs": (None, lambda t: t.update(more=torch.zeros(3)), "nothing needs, more"),
    "random state of another size": (None, lambda t: t.update({"cache0.0.random": torch.zeros(8, dtype=torch.uint8)}), r"must be \[5056\]"),
    "a random state that is none": (None, lambda t: t["cache0.0.random"].fill_(255), "cache0.0.random is no state"),
    "a codebook of floats": (None, reshape("cache0.0.book0.centroids", torch.Tensor.float), "type of cache0.0.book0.centroids"),
    "centroids that are no numbers": (None, put("cache0.0.book0.centroids", to=0xFF), "book0.centroids holds codes that are no number"),
    "scales that are no numbers": (None, put("cache0.0.1.key.scales", to=0x7F), "key.scales holds codes that are no number"),
    "channels scaled by nothing": (None, put("cache0.0.book0.channel_scale", to=0.0), "channel_scale holds 0"),
    "an endless scale": (None, put("cache0.0.book1.centroid_scale", to=INF), "centroid_scale holds inf"),
    "numbers beyond all others": (None, put("cache0.0.1.value.exponents", to=127), "the values that cache0.0.1.value stands for"),
    "latents that are no numbers": (None, put("latents", to=NAN), "latents holds nan"),
    "recent latents that are no numbers": (None, put("recent0", to=-INF), "recent0 holds -inf"),
    "latents of whole numbers": (None, reshape("latents", torch.Tensor.int), "type of latents"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_false_headers_with_right_checksums(saved, network, tmp_path, name):
    """What a file says may be signed and wrong. It is refused before the caches are touched."""
    header, tensors, words = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    rewrite(saved, path, header, tensors)
    target = sampler(network, SETTINGS["window"])
    with pytest.raises(SessionError, match=words):
        storage.load(path).restore(target, "x")
    assert target.frames_done == 0 and all(cache.frames == 0 for cache in target.model.caches)


def test_a_video_too_long_for_the_header_of_safetensors(network, tmp_path):
    """Fields and tensors of the spans of more than an hour, which took 100 MB of header; safetensors writes no more than that."""
    path, tensors = tmp_path / "long.safetensors", {f"extra.{number}": torch.full((3,), float(number)) for number in range(500)}
    made = sampler(network, SETTINGS["window"])
    go(made, 6)
    storage.save(path, made, fingerprint="x", extra={"text": "\"," * 30_000_000}, tensors=tensors)
    with safe_open(path, "pt") as file:
        assert len(list(file.keys())) < 10
    session = storage.load(path)
    assert len(session.extra["text"]) == 60_000_000 and session.tensors["extra.7"].tolist() == [7.0] * 3
    second = sampler(network, session.settings[0], session.run, session.shape)
    session.restore(second, "x")
    assert torch.equal(go(second), go(sampler(network, SETTINGS["window"]))[:, :, 6:])


@pytest.mark.parametrize("change, words", [
    (lambda content, metadata: content.pop(storage.HEADER), "its header is 'missing'"),
    (lambda content, metadata: content.update({storage.HEADER: torch.zeros(3)}), "the bytes of a text"),
    (lambda content, metadata: content.update({storage.HEADER: content[storage.HEADER][:-9].clone()}), "no JSON"),
    (lambda content, metadata: metadata.update({storage.DIGEST: "0"}), "has been changed"),
    (lambda content, metadata: content.pop("torch.uint8"), "lacks tensors"),
    (lambda content, metadata: content.update({"torch.uint8": content["torch.uint8"][:-1].clone()}), "shape of torch.uint8"),
    (lambda content, metadata: content.update({"torch.uint8": content["torch.uint8"].flip(0)}), "is not what was written"),
    (lambda content, metadata: content.update({"torch.float32": content["torch.float32"].half()}), "shape of torch.float32"),
])
def test_false_packed_files(network, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(storage, "MOST_HEADER_BYTES", 0)
    made, path = sampler(network, SETTINGS["window"]), tmp_path / "bad.safetensors"
    latents = go(made, 6)
    storage.save(path, made, fingerprint="x", latents=latents)
    with safe_open(path, "pt") as file:
        content, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()
    change(content, metadata)
    save_file(content, path, metadata)
    with pytest.raises(SessionError, match=words):
        storage.load(path)


def test_a_header_nested_without_end(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors", {storage.HEADER: 100_000 * "["})
    with pytest.raises(SessionError, match="damaged"):
        storage.load(tmp_path / "bad.safetensors")


def test_unsigned_header(saved, tmp_path):
    rewrite(saved, tmp_path / "bad.safetensors", lambda fields: fields.update(chunk=7), sign=False)
    with pytest.raises(SessionError, match="has been changed"):
        storage.load(tmp_path / "bad.safetensors")


def test_other_files(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(SessionError, match="is no session"):
        storage.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no session file"):
        storage.load(tmp_path / "nowhere.safetensors")


def test_sessions_go_with_their_model_size_and_settings(saved, network):
    session = storage.load(saved)
    for target, name, words in (
            (sampler(network, SETTINGS["window"]), "y", "another model"),
            (sampler(network, SETTINGS["balanced"]), "x", "other cache settings"),
            (sampler(network, SETTINGS["window"], shape=(2, *SHAPE[1:])), "x", "is of latents"),
            (sampler(network, SETTINGS["window"], replace(RUN, frames=3)), "x", "a longer video"),
            (sampler(network, SETTINGS["window"], cfg=2.0), "x", "holds 1 caches")):
        with pytest.raises(SessionError, match=words):
            session.restore(target, name)
        assert target.frames_done == 0


def test_fingerprint(network):
    torch.manual_seed(1)
    other = CausalWan(network.sizes)
    assert storage.fingerprint(network) == storage.fingerprint(network)
    assert storage.fingerprint(network) != storage.fingerprint(other)


def test_a_full_disk_leaves_the_older_session(saved, network, tmp_path):
    """The writing process may make files of at most 4 kB; its save fails with a sentence and the file that was there is whole."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved.read_bytes())
    program = """
import resource, signal, sys
import torch
from comfyui_qvg.qvg.video import session as storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    storage.write_atomically(storage.Path(sys.argv[1]), lambda place: storage.save_file({"x": torch.zeros(100_000)}, place))
except OSError as error:
    print(error)
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert path.read_bytes() == saved.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_settings_survive(saved):
    assert storage.load(saved).settings == [SETTINGS["window"]]
    assert isinstance(storage.load(saved).settings[0], QVGSettings)
