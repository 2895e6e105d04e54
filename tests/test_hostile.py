"""Hostile and broken files, reader by reader: no code runs, memory is bounded, one clear line."""

import bz2
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import (
    BYTEARRAY,
    EPS,
    Reader,
    attacks,
    bomb,
    edited,
    edits,
    json_changes,
    json_edited,
    lies,
    safetensors,
    watched,
    zipped,
)
from hypothesis import HealthCheck, given, settings
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from diffusion import UserError
from diffusion.data import archives
from diffusion.data.cache import Cache
from diffusion.data.image_set import digest
from diffusion.data.images import BadImage, read_image
from diffusion.data.pixels import Pixels
from diffusion.data.sources import folder_set
from diffusion.evaluation import features, fid
from diffusion.evaluation.features import open_features
from diffusion.files import adapter_files as adapters
from diffusion.files import checkpoint, text_files
from diffusion.files import embedding_files as embeddings
from diffusion.files import sd_files as loader
from diffusion.files import tokenizer_files as vocabulary
from diffusion.files.atomic import read_lines
from diffusion.files.tensors import read_tensors, write_tensors
from diffusion.files.text_files import read_prompt_lines
from diffusion.files.torch_files import LEGACY
from diffusion.files.validate import check_tensors
from diffusion.models.configs import VAEConfig
from diffusion.models.tokenizer import BYTE_OF, SYMBOLS, byte_level
from diffusion.models.vae import AutoencoderKL
from diffusion.pictures.grid import read_parameters
from diffusion.sampling.load import load, schedule_of
from diffusion.training.optimizer import AdamW

CPU = torch.device("cpu")
FUZZ = int(os.environ.get("FUZZ_EXAMPLES", 4))  # more of them: more time, more found


def copied(name: str):
    return lambda folder: Path(shutil.copy(GOOD / name, folder / name))


def written(name: str, content):
    def make(folder: Path) -> Path:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder / name

    return make


def part(folder: Path, name: str) -> Path:
    """A VAE's folder as diffusers writes it."""
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    loader.save_part(AutoencoderKL(config), folder, "diffusion_pytorch_model.safetensors")
    return folder / name


def tokenizer(folder: Path, name: str) -> Path:
    vocabulary.save_tokenizer(byte_level(77), folder)
    return folder / name


def pictures(folder: Path, name: str) -> Path:
    """Two pictures, of which the one not attacked makes the set usable."""
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        pixels[:4] = 90 * i
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a caption of {i}")
    table = [json.dumps({"file_name": f"{i}.png", "text": "t" * 20}) for i in range(2)]
    if name == "metadata.jsonl":
        (folder / name).write_text("\n".join(table))
    return folder / name


def all_pictures(file: Path) -> None:
    images = folder_set(file.parent)
    pixels = Pixels(images, 8, file.parent / ".cache", 1)
    assert len(pixels[np.arange(len(pixels))]) > 0
    assert images.captions is None or len(images.captions) == len(images)


def cached(folder: Path) -> Cache:
    def compute(chosen: range) -> np.ndarray:
        return np.array([[i, i] for i in chosen])

    return Cache(folder, 3, (2,), np.float16, compute, 2, "test")


def make_cache(folder: Path) -> Path:
    cached(folder)
    return folder / "00000.npy"


def read_cache(file: Path) -> None:
    if file.is_dir():
        raise UserError("a folder in place of a cache is not computed again")
    assert cached(file.parent)[np.arange(3)].shape == (3, 2)


def make_notes(folder: Path) -> Path:
    cached(folder)
    return written("00000.json", {"0": 2, "1": 2})(folder)


def read_notes(file: Path) -> None:
    if not file.is_dir():
        assert cached(file.parent).notes.keys() <= {0, 1, 2}


def make_statistics(folder: Path) -> Path:
    write_tensors(folder / "a.safetensors", {"mean": torch.zeros(3), "cov": torch.eye(3)}, {})
    return folder / "a.safetensors"


def lines(file: Path) -> None:
    found = read_lines(file) if not file.is_dir() else []
    assert all(isinstance(line["step"], int) for line in found)


def archive(kind: str):
    def make(folder: Path) -> Path:
        pictures(folder / "in", "0.png") if (folder / "in").mkdir() is None else None
        shutil.make_archive(str(folder / "a"), kind, folder / "in")
        return next(folder.glob("a.*"))

    def read(file: Path) -> None:
        target = file.parent / "unpacked"
        try:
            archives.fetch(file.absolute().as_uri(), target)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    return make, read


def resume(file: Path) -> None:
    """As a run goes on: from the newest good one, here the older of two."""
    told: list[str] = []
    state = checkpoint.newest(file.parent.parent, told.append)
    if told:  # the newer one was refused
        assert state["step"] == 30 and "step_00000030.pt, the newest that is intact" in told[-1]
        raise UserError(told[0].removeprefix("warning: "))


def old_and_new(folder: Path) -> Path:
    (folder / "checkpoints").mkdir()
    old = checkpoint.read(GOOD / "model.pt") | {"step": 30}
    torch.save(old, folder / "checkpoints" / "step_00000030.pt")
    return Path(shutil.copy(GOOD / "model.pt", folder / "checkpoints" / "step_00000060.pt"))


def torch_file(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.arange(99.0), "b": torch.ones(3, 3)}}, folder / "a.ckpt")
    return folder / "a.ckpt"


def tensor_file(folder: Path) -> Path:
    save_file({"a": torch.arange(99.0), "b": torch.ones(3, 3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def torchscript(folder: Path) -> Path:
    torch.jit.script(torch.nn.Flatten()).save(folder / "a.pt")
    return folder / "a.pt"


def cifar(folder: Path) -> Path:
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    (folder / "data_batch_1.bin").write_bytes(bytes(3073 * 3))
    return folder / "data_batch_1.bin"


LORA = {"unet.a.b.lora_A.weight": torch.ones(2, 8), "unet.a.b.lora_B.weight": torch.ones(8, 2)}
ALPHA = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"b": 3}}
NETWORKS = {"unet": torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": torch.nn.Linear(8, 8)})})}


def saved(name: str, tensors: dict):
    def make(folder: Path) -> Path:
        save = save_file if name.endswith("safetensors") else torch.save
        save(tensors, folder / name)
        return folder / name

    return make


def peft_folder(folder: Path) -> Path:
    saved("adapter_model.safetensors", LORA)(folder)
    return written("adapter_config.json", ALPHA)(folder)


def read_lora(path: Path) -> dict:
    return adapters.read_lora(path, NETWORKS)


def read_told(file: Path) -> None:
    """A LoRA whose metadata is the file's text."""
    text, _ = text_files.read_text_file(file)
    save_file(LORA, file.parent / "a.safetensors", metadata={adapters.METADATA: text})
    read_lora(file.parent / "a.safetensors")


def read_token(file: Path) -> None:
    for token, vectors in embeddings.read_embedding(file, 8).items():
        assert token.encode() and vectors.isfinite().all() and len(vectors)


def tokenizer_json(folder: Path) -> Path:
    vocab = tokenizer(folder, "vocab.json")
    model = {"vocab": json.loads(vocab.read_text()), "merges": [], "end_of_word_suffix": "</w>"}
    vocab.unlink()
    return written("tokenizer.json", {"model": model, "added_tokens": []})(folder)


def added_tokens(folder: Path) -> Path:
    tokenizer(folder, "vocab.json")
    return written("added_tokens.json", {"<a>": 514, "<b>": 515})(folder)


def prompt_of(file: Path) -> None:
    if read_parameters(file) is None:
        raise UserError("no prompt")


def with_prompt(folder: Path) -> Path:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3")
    Image.new("RGB", (8, 8)).save(folder / "0.png", pnginfo=info)
    return folder / "0.png"


def load_vae(file: Path) -> None:
    loader.load_vae(file.parent)


def load_tokenizer(file: Path) -> None:
    vocabulary.load_tokenizer(file.parent)


def bpe(folder: Path) -> Path:
    path = folder / vocabulary.VOCABULARY
    path.write_bytes(gzip.compress("\n".join(["#version", *MERGES, ""]).encode()))
    return path


# the number of merges that CLIP's file has
MERGES = [f"{a} {b}" for a in BYTE_OF for b in SYMBOLS][:48894]
INDEX = {"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}

READERS = [
    Reader("model.pt", "checkpoint", copied("model.pt"), load),
    Reader("resume", "checkpoint", old_and_new, resume),
    Reader("ema.safetensors", "network", copied("ema.safetensors"), load),
    Reader("foreign .ckpt", "weights", torch_file, read_tensors),
    Reader("foreign .safetensors", "safetensors", tensor_file, read_tensors),
    Reader("index of shards", "json", lambda f: (tensor_file(f), written("a.json", INDEX)(f))[1], read_tensors),
    Reader("VAE weights", "network", lambda f: part(f, "diffusion_pytorch_model.safetensors"), load_vae),
    Reader("VAE config.json", "json", lambda f: part(f, "config.json"), load_vae),
    Reader("scheduler_config.json", "json", written("scheduler_config.json", loader.SCHEDULER),
           lambda f: schedule_of(loader.SCHEDULER | loader.complete_scheduler(loader.read_json(f), f))),
    Reader("vocab.json", "json", lambda f: tokenizer(f, "vocab.json"), load_tokenizer),
    Reader("merges.txt", "text", lambda f: tokenizer(f, "merges.txt"), load_tokenizer),
    Reader("tokenizer_config.json", "json", lambda f: tokenizer(f, "tokenizer_config.json"), load_tokenizer),
    Reader("vocabulary, gzip", "text", bpe, load_tokenizer),
    Reader("tokenizer.json", "json", tokenizer_json, load_tokenizer),
    Reader("added_tokens.json", "json", added_tokens, load_tokenizer),
    Reader("LoRA", "network", saved("a.safetensors", LORA), read_lora),
    Reader("LoRA, .bin", "weights", saved("a.bin", LORA), read_lora),
    Reader("LoRA's metadata", "json", written("m.json", {f"unet.{k}": v for k, v in ALPHA.items()}), read_told),
    Reader("adapter_config.json", "json", peft_folder, lambda f: read_lora(f.parent)),
    Reader("embedding", "network", saved("a.safetensors", {"<a>": torch.ones(2, 8)}), read_token),
    Reader("embedding, .bin", "weights", saved("a.bin", {"<a>": torch.ones(2, 8)}), read_token),
    Reader("prompt in a PNG", "image", with_prompt, prompt_of),
    Reader("prompts", "text", written("p.txt", "a cat\na dog\n"), read_prompt_lines),
    Reader("image", "image", lambda f: pictures(f, "0.png"), lambda f: read_image(f, 8)),
    Reader("image of a folder", "image", lambda f: pictures(f, "0.png"), all_pictures, heals=True),
    Reader("caption", "text", lambda f: pictures(f, "0.txt"), all_pictures, heals=True),
    Reader("metadata.jsonl", "json", lambda f: pictures(f, "metadata.jsonl"), all_pictures),
    Reader("FID statistics", "safetensors", make_statistics, fid.read_moments, heals=True),
    Reader("cache", "text", make_cache, read_cache, heals=True),
    Reader("cache's notes", "json", make_notes, read_notes, heals=True),
    Reader("metrics.jsonl", "json", written("metrics.jsonl", '{"step": 1, "loss": 2}\n' * 9), lines, heals=True),
    Reader("TorchScript", "text", torchscript, lambda f: open_features(str(f), CPU)),
    Reader("archive, zip", "packed", *archive("zip")),
    Reader("archive, tar.gz", "packed", *archive("gztar")),
    Reader("CIFAR-10", "text", cifar, lambda f: archives.cifar_set(f.parent)),
]  # fmt: skip
# what may be read, although it is not what was written: there is nothing in it that could be wrong
HARMLESS = {
    ("prompts", "*"), ("merges.txt", "*"), ("metadata.jsonl", "*"), ("tokenizer_config.json", "*"),
    ("scheduler_config.json", "nothing in it"), ("VAE config.json", "nothing in it"),
    ("foreign .safetensors", "no tensors"), ("resume", "missing"), ("image", "cut at 90 %"), ("image", "text bomb"),
    ("archive, tar.gz", "*"), ("added_tokens.json", "nothing in it"),
    ("added_tokens.json", "missing"), ("added_tokens.json", "link to itself"), ("LoRA's metadata", "nothing in it"),
    ("adapter_config.json", "nothing in it"),
    ("prompt in a PNG", "cut at 80 %"), ("prompt in a PNG", "cut at 90 %"),
    ("scheduler_config.json", "missing"), ("vocabulary, gzip", "*"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def good(model):
    """Where the finished run's files are."""
    global GOOD
    GOOD = model.parent
    return GOOD


SLOW = ("resume", "model.pt")  # a run, or a checkpoint, opened for each of many edits


@pytest.mark.parametrize(
    "reader",
    [pytest.param(r, marks=pytest.mark.slow) if r.name in SLOW else r for r in READERS],
    ids=lambda r: r.name,
)
def test_hostile_files(reader, tmp_path, monkeypatch):
    """The whole corpus of its kind; each is refused in one line, or made again."""
    passed = {}
    for i, (name, attack) in enumerate(attacks(reader.kind).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        file = reader.make(folder)
        assert i or watched(reader, file) is None, "the good file is refused"
        if file.exists():
            attack(file)
            passed[name] = watched(reader, file)
        shutil.rmtree(folder, ignore_errors=True)
    if not reader.heals:
        free = {what for who, what in HARMLESS if who == reader.name}
        read = {name for name, told in passed.items() if told is None}
        assert "*" in free or read <= free, read - free
    assert len(passed) > 15


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_fuzzed_for_longer(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FUZZ", max(FUZZ, 20))
    test_fuzzed_files(reader, tmp_path, monkeypatch)


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_fuzzed_files(reader, tmp_path, monkeypatch):
    """Random edits of good files: whatever comes of them, it is no crash."""
    monkeypatch.chdir(tmp_path)
    file = reader.make(tmp_path)
    data, text = file.read_bytes(), None
    if reader.kind == "json" and not file.name.endswith("jsonl"):
        text = json.loads(data)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    quick = settings(max_examples=FUZZ, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(HealthCheck))  # fmt: skip

    def attempt(content: bytes) -> None:
        for path, before in kept.items():
            path.write_bytes(before)
        file.write_bytes(content)
        watched(reader, file)

    quick(given(edits())(lambda changes: attempt(edited(data, changes))))()
    if text is not None:
        quick(given(json_changes())(lambda c: attempt(json.dumps(json_edited(text, c)).encode())))()


# --- names, links, archives --------------------------------------------------------------------------


def test_nothing_is_written_beside_an_archive(tmp_path):
    """Names with .., absolute ones and links lead nowhere."""
    (tmp_path / "secret.txt").write_text("s")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for name in ("../../escaped.png", "/escaped.png", "..\\escaped.png", "ok/1.png"):
            z.writestr(name, b"x")
    archives.fetch((tmp_path / "a.zip").as_uri(), tmp_path / "deep" / "from_zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.addfile(tarfile.TarInfo("folder/empty.png"))
        some = tarfile.TarInfo("1.png")
        some.size = 3
        t.addfile(some, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../secret.txt"
        t.addfile(link)
    archives.fetch((tmp_path / "a.tar.gz").as_uri(), tmp_path / "deep" / "from_tar")
    found = (p for p in (tmp_path / "deep" / "from_tar").rglob("*") if not p.is_dir())
    assert sorted(p.name for p in found) == ["1.png"]  # nothing is written of empty ones
    outside = {p.name for p in tmp_path.iterdir()} | {p.name for p in (tmp_path / "deep").iterdir()}
    assert not any("escaped" in name for name in outside) and not Path("/escaped.png").exists()
    assert (tmp_path / "deep" / "from_zip" / "ok" / "1.png").read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_would_fill_the_disk(tmp_path, kind):
    size = 1 << 28
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("1.png", bytes(size))
    else:
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
            info = tarfile.TarInfo("1.png")
            info.size = size
            t.addfile(info, io.BytesIO(bytes(size)))
    with pytest.raises(UserError, match="268,435,456"):
        archives.fetch((tmp_path / f"a.{kind}").as_uri(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.fetch"))


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress], ids=["bz2", "gz"])
@pytest.mark.parametrize("good", [False, True], ids=["zeros", "behind a good one"])
def test_zeros_without_end_in_an_archive(tmp_path, pack, good):
    """Of which a few kB are hours of work, whatever lengths the members claim."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as t:
        info = tarfile.TarInfo("1.png")
        info.size = 1 if good else 0
        t.addfile(info, io.BytesIO(b"x"[: info.size]))
    zeros = pack(bytes(1 << 24))
    (tmp_path / "a").write_bytes(pack(raw.getvalue()) + 40 * zeros)
    start = time.perf_counter()
    with pytest.raises(UserError, match="/a "):
        archives.fetch((tmp_path / "a").as_uri(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and time.perf_counter() - start < 30


def test_links_are_followed_and_loops_are_cut(tmp_path):
    """As other programs follow them: out of the folder, and within it."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        pictures(folder, "0.png")
    (data / "out.png").symlink_to(other / "0.png")
    (data / "out").symlink_to(other)
    (data / "in.png").symlink_to("0.png")
    (other / "loop").symlink_to(data)
    (tmp_path / "link").symlink_to(data)
    for root in (data, tmp_path / "link"):
        names = folder_set(root).names
        assert names == ["0.png", "1.png", "in.png", "out.png", "out/0.png", "out/1.png"]


def test_names_of_another_folder_in_metadata(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pictures(data, "0.png")
    names = ["../../etc/passwd", "/etc/passwd", "0.png"]
    (data / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": n, "text": f"of {n}\u2028x"}, ensure_ascii=False) + "\n"
            for n in names
        )
    )  # a line separator of Unicode's ends no line of JSON
    images = folder_set(data)
    assert images.names == ["0.png", "1.png"] and images.captions[0] == "of 0.png x"


def test_captions_that_never_end(tmp_path, capsys):
    pictures(tmp_path, "0.png")
    (tmp_path / "0.txt").write_bytes("é".encode() * 10**6)
    images = folder_set(tmp_path)
    assert images.captions[0].startswith("éé") and len(images.captions[0]) == 1 << 15
    assert "more than 65,536 bytes; cut off" in capsys.readouterr().out


def test_a_postscript_program_is_no_image(tmp_path, monkeypatch):
    """Pillow knows a file by its content, and gives EPS to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("it runs"))
    (tmp_path / "a.png").write_text(EPS)
    with pytest.raises(BadImage, match="not an image"):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("told, match", [
    ({"unet.lora_alpha": 10**400}, "settings of alpha are unusable"),
    ({"unet.lora_alpha": [1]}, "settings of alpha are unusable"),
    ({"unet.lora_alpha": float("nan")}, "settings of alpha are unusable: a.b has nan"),
    ({"unet.alpha_pattern": [1]}, "settings of alpha are unusable"),
    ({"unet.alpha_pattern": {"([a-z_0-9.]+)+X": 1}}, "is a regular expression"),
], ids=str)  # fmt: skip
def test_settings_of_a_lora(tmp_path, told, match):
    (tmp_path / "m.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=match) as caught:
        read_told(tmp_path / "m.json")
    assert len(str(caught.value)) < 500


def test_alpha_patterns_are_peft_s():
    """get_pattern_key: the whole name or its end, the first that fits."""
    for pattern, alpha in (("b", 3), ("a.b", 3), ("^a.b", 3), (r"a\.b$", 3), (r"(.*\.)?b", 3),
                           ("^b", 4), ("c", 4), ("ab", 4), ("a", 4)):  # fmt: skip
        given = {"lora_alpha": 4, "alpha_pattern": {pattern: 3, "b.a": 9}}
        found = adapters._alpha(Path("file"), given, "a.b", 1)
        assert found == alpha, pattern


@pytest.mark.parametrize("state", [
    {"<a>": lies(torch.ones(1).half(), (1 << 22, 8))}, {"<a>": torch.full((2, 8), float("nan"))},
    {"<a>": torch.ones(2, 8, device="meta")}, {"<a>": torch.ones(2, 8) * 1j},
    {"<a>": torch.ones(0, 8)}, {7: torch.ones(1, 8)}, {"a\nb": torch.ones(1, 8)},
    {"\ud800": torch.ones(1, 8)}, {"string_to_param": {"*": torch.ones(1, 9)}, "name": ["x"] * 999},
], ids=range(9))  # fmt: skip
def test_embeddings_that_are_none(tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    assert watched(Reader("", "", None, read_token), tmp_path / "a.bin")


def test_a_lora_of_rank_2_24(tmp_path):
    """A file of 2 kB, that would be 10 GB in float32."""
    down, up = (lies(torch.ones(1).half(), size) for size in ((1 << 24, 8), (8, 1 << 24)))
    torch.save({name: v for name, v in zip(LORA, (down, up))}, tmp_path / "a.bin")
    told = watched(Reader("", "", None, read_lora), tmp_path / "a.bin")
    assert "more than the file holds" in told


@pytest.mark.parametrize("text", ['{"x": 1}', '{"99": 1}', "[1]", "{"])
def test_a_cache_with_notes_on_other_entries_is_computed_again(tmp_path, text):
    make_cache(tmp_path)
    (tmp_path / "00000.json").write_text(text)
    assert cached(tmp_path).notes == {}
    assert json.loads((tmp_path / "00000.json").read_text())["notes"] == {}


def test_a_pipe_is_not_waited_for(tmp_path):
    pictures(tmp_path, "0.png")
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(BadImage, match="a pipe"):
        read_image(tmp_path / "0.png", 8)
    assert read_parameters(tmp_path / "0.png") is None
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match="pipe"):
        folder_set(tmp_path)


def test_halves_of_characters_in_captions(tmp_path):
    pictures(tmp_path, "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a \\ud800 cat"}')
    images = folder_set(tmp_path)
    assert images.captions[0] == "a ? cat" and digest(*images.captions)
    byte_level(77).encode(images.captions[0])


@pytest.mark.parametrize("dtype, value", [(np.uint16, 257), (np.float32, 1 / 255)], ids=str)
def test_deep_grey_takes_no_more_than_its_pixels(tmp_path, dtype, value):
    image = Image.fromarray(np.full((5000, 5000), value, dtype))
    image.save(tmp_path / "a.tiff")
    reader = Reader("", "", None, lambda f: read_image(f, 8))
    assert watched(reader, tmp_path / "a.tiff") is None
    assert (read_image(tmp_path / "a.tiff", 8) == 1).all()


def test_large_json_and_vocabularies(tmp_path):
    (tmp_path / "a.json").write_text('{"a":[' + ",".join(["{}"] * (20 << 20)) + "]}")
    told = watched(Reader("", "", None, text_files.read_json), tmp_path / "a.json")
    assert f"at most {8 << 20:,} are read" in told
    for content in (b"\n" * (64 << 20), b"a b\n" * (16 << 20)):
        path = tmp_path / vocabulary.VOCABULARY
        path.write_bytes(gzip.compress(content, 1))
        assert "more than 8 MB" in watched(Reader("", "", None, load_tokenizer), path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_an_archive_with_a_giant_name(tmp_path, kind):
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as out:
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = kind, 1 << 29
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(32):
            out.write(bytes(1 << 24))
    reader = Reader("", "", None, lambda f: archives.fetch(f.as_uri(), tmp_path / "out"))
    assert "could not be fetched" in watched(reader, tmp_path / "a.tar.gz")


def test_words_in_a_checkpoint_are_no_calls(good, tmp_path):
    """A folder's or class's name may be that of a function; the names asked for are another."""
    state = checkpoint.read(good / "model.pt")
    state["classes"] = ["bytearray", "_codecs", "encode"]
    state["config"] |= {"data": "/data/bytearray_faces"}
    torch.save(state, tmp_path / "a.pt")
    assert checkpoint.read(tmp_path / "a.pt")["classes"] == state["classes"]


@pytest.mark.parametrize("value", [
    torch.ones(2) * 1j, torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    *[torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name)) for name in ("float4_e2m1fn_x2",)
      if hasattr(torch, name)],  # since torch 2.8
], ids=lambda v: f"{v.dtype} {v.layout} {v.device}")  # fmt: skip
def test_tensors_of_other_kinds(value):
    with pytest.raises(UserError, match="expected plain numbers"):
        check_tensors({"a": torch.ones(2), "b": value}, "it")


def test_checkpoints_of_the_world_are_read(tmp_path):
    """All that tensors are saved as, and a plain training state beside them; old files, too."""
    want = {"a": torch.ones(2, 3), "h": torch.ones(2).half(), "b": torch.ones(2).bfloat16(),
            "p": torch.nn.Parameter(torch.ones(2)), "u": torch.ones(2, dtype=torch.uint16),
            "f8": torch.ones(2).to(torch.float8_e4m3fn), "bool": torch.ones(2).bool()}  # fmt: skip
    more = {"epoch": 3, "seen": {1, 2}, "counts": Counter("abc"), "dtype": torch.float32,
            "shape": torch.Size([1]), "device": torch.device("cpu"), "z": 1j}  # fmt: skip
    for new in (True, False):
        file = tmp_path / f"{new}.ckpt"
        state = {"state_dict": OrderedDict(want if new else {"a": want["a"]}), **more}
        torch.save(state, file, _use_new_zipfile_serialization=new)
        found = read_tensors(file)
        assert found.keys() == state["state_dict"].keys()
        assert all(torch.equal(found[k].float(), want[k].float()) for k in found)


def test_a_checkpoint_that_claims_a_giant_network(good, tmp_path):
    """Nothing is built before the weights are seen to fit."""
    state = checkpoint.read(good / "model.pt")
    state["config"] |= {"unet_dim": 1 << 16, "dim_mults": (1, 64)}
    torch.save(state, tmp_path / "a.pt")
    reader = Reader("giant", "checkpoint", copied("model.pt"), load)
    assert "does not fit" in watched(reader, tmp_path / "a.pt")


def test_hostile_pickles_and_headers(tmp_path, monkeypatch):
    """What is checked is what is read, whatever a pickle, a zip file or a header claims."""
    monkeypatch.chdir(tmp_path)
    most = 3 << 20
    plain = zipped(pickle.dumps({}))
    old = LEGACY + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    entry = b"PK\x01\x02" + bytes(24) + b"\1\0" + bytes(16) + b"a"
    files = {
        # two directories in one file, of which the first one leads to half a gigabyte
        "two zips": (bomb() + plain, "no weights"),
        "old with a zip behind": (old + BYTEARRAY + pickle.dumps([], 2) + plain, "bytearray"),
        "directory": (b"PK\3\4" + entry * (5 << 20 >> 5) + b"PK\5\6" + bytes(8)
                      + struct.pack("<II", len(entry) * (5 << 20 >> 5), 4) + bytes(2), "directory"),
        "lists": (zipped(b"\x80\x02" + b"]" * (most - 9) + b"."), "list"),
        "longer": (zipped(b"\x80\x02" + b"]" * most + b"."), "3 MB"),
        "memo": (zipped(b"\x80\x02}r\xff\xff\xff\xff."), "no weights"),
        # a dictionary's key of tuples in tuples would be hashed to any depth of the stack
        "deep key": (zipped(b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."), "no weights"),
        "call of a result": (zipped(b"\x80\x02cx\ny\n)R)R."), "no weights"),
        "set on a name": (zipped(b"\x80\x02cx\ny\nK\x01K\x02s."), "no dictionary"),
        "state on a function": (zipped(b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\1aU\1bsb."), "no weights|holds a"),
        "long number": (zipped(b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"x" * (1 << 20) + b"."), "holds a bytes"),
        "copies": (zipped(b"\x80\x02cx\nA\nq\0}q\1(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(60_000))
                          + b"u0h\1\x85q\2](" + b"h\0h\2R" * 2000 + b"e."), "list"),
        "program": (zipped(b"\x80\x02cposix\nsystem\nU\1x\x85R."), "posix.system"),
        "escapes": (zipped(b"\x80\x02csubprocess\na\x1b[31m\r\n"), "x1b"),
        "header": (safetensors(b"{" + b" " * (9 << 20) + b"}"), "header"),
        "texts": (safetensors({"__metadata__": {f"{i:x}": "" for i in range(5 * 10**5)}}), "no weights"),
    }  # fmt: skip
    for name, (content, told) in files.items():
        (tmp_path / name).write_bytes(content)
        found = watched(Reader("", "", None, read_tensors), tmp_path / name)
        assert found and re.search(told, found) and "\x1b" not in found, (name, found)


@pytest.mark.parametrize(
    "where",
    [
        (0, (4,), (1,)),  # beyond the end
        (0, (1 << 28,), (0,)),
        (0, (3, 1 << 40, 0), (1, 1, 1)),  # nothing, and nothing is taken for it
        (1, (2,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1 << 62,)),
        (0, (1,) * 99, (1,) * 99),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("new", [True, False])
def test_tensors_beyond_their_storage(tmp_path, where, new):
    class Claim:
        def __reduce__(self):
            storage = torch.ones(2).untyped_storage()
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (typed, *where, False, OrderedDict())

    torch.save({"a": Claim()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    try:
        found = read_tensors(tmp_path / "a.pt")["a"]
    except UserError as error:
        assert "a.pt" in str(error)
    else:
        assert not found.numel()


def test_pipes_and_devices_are_no_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    for file in ("pipe.safetensors", "zero.ckpt"):
        for read in (read_tensors, load, loader.load_vae, read_lora, read_token):
            with pytest.raises(UserError, match=file):
                read(tmp_path / file)


def test_moments_of_other_weights():
    """torch's fused kernel would write beyond the end of these."""
    optimizer = AdamW([torch.nn.Parameter(torch.ones(16))], 0.1)
    good = {"step": torch.tensor(1.0), "exp_avg": torch.ones(16), "exp_avg_sq": torch.ones(16)}
    for odd in (good | {"exp_avg": torch.ones(2)}, {"step": good["step"]}, good | {"x": good}):
        with pytest.raises((ValueError, AttributeError)):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: odd}})
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: good}})


ODD_VALUES = (..., None, 0, "x", [], {}, {1: 1}, torch.ones(2))


@pytest.mark.parametrize("part", [
    "step", "best_loss", "ranks", "config", "classes", "data", "model", "ema", "optimizer",
    "scaler", "tally",
])  # fmt: skip
def test_a_checkpoint_with_a_part_of_another_kind(good, tmp_path, part):
    """As a run goes on, and as a model: one line, and no traceback."""
    state = checkpoint.read(good / "model.pt")
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "step_00000060.pt"
    refused = 0
    for value in ODD_VALUES:
        changed = state | {part: value}
        if value is ...:
            del changed[part]
        torch.save(changed, file)
        for read in (load, lambda f: checkpoint.newest(f.parent.parent, lambda message: None)):
            try:
                read(file)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1500
    assert refused >= 4


def test_networks_are_kept_where_no_other_user_writes(monkeypatch, tmp_path):
    """clean-fid's own place is /tmp, where anybody can lay a file before us."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert features.cache_folder() == tmp_path / ".cache" / "diffusion"
    seen = []
    monkeypatch.setattr("diffusion.evaluation.features._fetch", lambda file: seen.append(file))
    with pytest.raises(UserError, match="cannot be read as TorchScript"):
        open_features(None, CPU)
    assert seen == [tmp_path / ".cache" / "diffusion" / features.INCEPTION]


def test_tensorboard_gets_no_text_of_captions_or_file_names(model):
    """Its text panel renders Markdown: what options say stands there as code, a line each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(model.parent / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["tensors"] == ["config"]
    text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines())
    assert set(tags["scalars"]) <= features.RESERVED
    assert features.name_of("<img src=x onerror=alert(1)>.pt") == "img_src_x_onerror_alert_1"
