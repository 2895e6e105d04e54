"""What goes in: images of all kinds, folders, captions, the cache, batches, archives and the hub."""

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from PIL import Image

from diffusion import UserError
from diffusion.data import archives, cache, sources, toy
from diffusion.data.batches import Batches, to_unit
from diffusion.data.hub import HubSet
from diffusion.data.image_set import digest, held_out
from diffusion.data.images import BadImage, read_image, to_pixels
from diffusion.data.pixels import Pixels
from diffusion.data.sources import folder_set, open_data
from diffusion.data.stream import StreamBatches


def pixels_of(folder, size=16, cache_dir=None, **options):
    return Pixels(folder_set(Path(folder), **options), size, cache_dir)


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    with tarfile.open(ROOT / "tests" / "assets" / "bad_images.tar") as tar:
        tar.extractall(root, filter="fully_trusted")
    return root / "bad_images"


MANIFEST = json.loads(
    tarfile.open(ROOT / "tests" / "assets" / "bad_images.tar").extractfile("bad_images/MANIFEST.json").read()
)["entries"]  # fmt: skip


@pytest.fixture(scope="module")
def scanned(bad, tmp_path_factory):
    """The whole corpus through scan, captions and cache: (set, kept names, what was printed)."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        images = folder_set(bad)
        pixels = Pixels(images, 96, tmp_path_factory.mktemp("cache"))
    return images, set(pixels.images.names), out.getvalue()


@pytest.mark.parametrize("entry", MANIFEST, ids=lambda e: ascii(e["path"]))
def test_bad_images(bad, scanned, entry):
    images, kept, printed = scanned
    path, expect = entry["path"], entry["expect"]
    warned = repr(path) in printed
    if expect in ("load", "load_caption_warn"):
        assert path in kept
    if expect == "skip_warn":
        assert path in images.names and path not in kept and warned
    if expect == "load_or_skip_warn":
        assert path in kept or warned
    if expect in ("ignore", "not_an_image", "ignore_or_warn"):
        assert path not in images.names
    if expect == "load_caption_warn":
        assert (
            repr(str(bad / path))[1:-1] in printed
            or repr(str((bad / path).with_suffix(".txt")))[1:-1] in printed
        )
    if path in kept and "pixels" in entry:
        _check_pixels(bad / path, entry)
    if isinstance(entry.get("caption"), str) and path in kept:
        assert images.captions[images.names.index(path)] == entry["caption"]
    if "caption_any_of" in entry:
        assert images.captions[images.names.index(path)] in entry["caption_any_of"]


def _check_pixels(path, entry):
    """The manifest samples the whole picture; a square crop of 96x64 keeps columns 16...80."""
    from PIL import ImageOps

    from diffusion.data.images import to_rgb

    with Image.open(path) as image:
        rgb = np.asarray(to_rgb(ImageOps.exif_transpose(image))).astype(int)
    assert [rgb.shape[1], rgb.shape[0]] == entry["size"]
    square = read_image(path, 64).astype(int)
    for name, expected in entry["pixels"].items():
        fy, fx = 0.25 + 0.5 * ("bottom" in name), 0.25 + 0.5 * ("right" in name)
        whole = rgb[int(fy * rgb.shape[0]), int(fx * rgb.shape[1])]
        assert abs(whole - expected).max() <= entry["tol"], (name, whole)
        cut = square[int(fy * 64), int(0.125 * 64) if fx < 0.5 else int(0.875 * 64)]
        assert abs(cut - expected).max() <= entry["tol"], (name, cut)


def test_bad_images_are_told_once_and_counted(scanned):
    images, kept, printed = scanned
    skipped = len(images) - len(kept)
    assert f"{skipped} of {len(images)} images cannot be used" in printed
    assert printed.count("truncated.jpg'") == 1


def test_no_cache_puts_a_good_image_in_place_of_a_bad_one(bad, capsys):
    pixels = pixels_of(bad, 16)
    everything = pixels[np.arange(len(pixels))]
    pixels[np.arange(len(pixels))]
    assert everything.shape == (len(pixels), 16, 16, 3)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("'zero_byte.jpg'") == 1


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        folder_set(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="1 images of .*" + tmp_path.name):
        pixels_of(tmp_path, 16, tmp_path / "cache")
    with pytest.raises(UserError, match="1 images of .*" + tmp_path.name):
        pixels_of(tmp_path, 16)[np.array([0])]


# --- one image --------------------------------------------------------------------------------------


def test_square_crop_and_lanczos():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    expected = np.asarray(image.crop((10, 0, 50, 40)).resize((16, 16), Image.LANCZOS))
    assert np.array_equal(to_pixels(image, 16), expected)


@pytest.mark.parametrize("mode, value, expected", [
    ("F", 0.5, 128), ("1", 1, 255), ("P", 0, 0), ("LA", (100, 255), 100), ("LA", (0, 0), 255),
])  # fmt: skip
def test_modes(mode, value, expected):
    assert abs(int(to_pixels(Image.new(mode, (4, 4), value), 4)[0, 0, 0]) - expected) <= 1


def test_reasons_are_readable(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(BadImage, match="not an image"):
        read_image(tmp_path / "x.jpg", 8)
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "y.jpg", 8)


# --- the toy ----------------------------------------------------------------------------------------


def test_toy_is_deterministic_and_captioned():
    images = open_data("toy")
    assert len(images) >= 10_000 and len(set(images.names)) == len(images)
    a, b = images.read(77, 32), toy.draw(77, 32)
    assert a.shape == (32, 32, 3) and np.array_equal(a, b)
    assert not np.array_equal(a, images.read(78, 32))
    for i in range(200):
        attributes, caption = toy.attributes(i), images.captions[i]
        words = [attributes[k] for k in ("hair", "skin", "mouth", "background")]
        assert all(w in caption for w in words)
        background = toy.draw(i, 64)[1, 1]
        assert abs(background.astype(int) - toy.BACKGROUND[attributes["background"]]).max() <= 4
    shown = b"".join(toy.draw(i, size).tobytes() for i in range(8) for size in (16, 64))
    assert hashlib.sha256(shown).hexdigest().startswith("1cdb9e860b09e0ce468088b713d2f5b2")
    bob = open_data("toy", data_class="bob")
    assert set(bob.labels) == {0} and all("bob" in c for c in bob.captions)


# --- folders ----------------------------------------------------------------------------------------


def test_class_folders(faces):
    images = folder_set(faces)
    assert images.classes == ["bald", "bob", "spiky"] and len(images) == 120
    assert all(
        images.classes[label] == name.split("/")[0]
        for label, name in zip(images.labels, images.names)
    )
    one = folder_set(faces, data_class="bob")
    assert len(one) == 40 and one.classes == ["bob"] and set(one.labels) == {0}
    with pytest.raises(UserError, match="bald.*bob.*spiky"):
        folder_set(faces, data_class="dog")


def test_afhq_layout_uses_train(tmp_path):
    for split, kind, n in (("train", "cat", 3), ("train", "dog", 2), ("val", "cat", 1)):
        folder = tmp_path / "afhq" / split / kind
        folder.mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), "red").save(folder / f"{i}.JPG", format="JPEG")
    images = folder_set(tmp_path / "afhq")
    assert len(images) == 5 and images.classes == ["cat", "dog"]
    assert len(folder_set(tmp_path / "afhq", data_class="cat")) == 3


def test_captions(tmp_path, capsys):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert folder_set(tmp_path).captions is None
    assert folder_set(tmp_path, default_caption="a cat").captions == ["a cat"] * 4
    (tmp_path / "a.txt").write_text("from\n a file")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "from metadata"}\n\n')
    assert folder_set(tmp_path, default_caption="none").captions == [
        "from a file",
        "from metadata",
        "none",
        "none",
    ]
    printed = capsys.readouterr().out
    assert "2 of 4 captions have problems" in printed and "c.png" in printed
    (tmp_path / "metadata.jsonl").write_text('{"file": "b.png"}\n')
    assert folder_set(tmp_path).captions == ["from a file", "", "", ""]
    assert "metadata.jsonl has no column file_name" in capsys.readouterr().out


def test_what_data_can_mean(tmp_path, monkeypatch, faces):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(faces)
    assert len(open_data("mine")) == len(open_data(str(faces))) == 120
    with pytest.raises(UserError, match="anime_faces, pokemon"):
        open_data("anime_face")
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(UserError, match="x.zip"):
        open_data("x.zip")


# --- the cache --------------------------------------------------------------------------------------


def test_cache_is_used_and_noticed_to_be_stale(tmp_path, monkeypatch):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(root / f"{i}.png")
    every = np.arange(5)
    first = pixels_of(root, 8, tmp_path / "c")
    assert first[every][:, 0, 0, 0].tolist() == [0, 50, 100, 150, 200]
    monkeypatch.setattr(cache.Cache, "_write", None)  # a second build would fail
    again = pixels_of(root, 8, tmp_path / "c")
    assert np.array_equal(first[every], again[every]) and not again.cache.built
    monkeypatch.undo()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "2.png")
    os.utime(root / "2.png", ns=(1, 1))
    assert pixels_of(root, 8, tmp_path / "c")[every][2, 0, 0, 0] == 9
    assert pixels_of(root, 4, tmp_path / "c")[every].shape == (5, 4, 4, 3)


def test_a_truncated_cache_is_computed_again(tmp_path, faces):
    every = np.arange(120)
    good = pixels_of(faces, 16, tmp_path)[every]
    (data,) = tmp_path.glob("*/*.npy")
    os.truncate(data, 1000)
    assert np.array_equal(pixels_of(faces, 16, tmp_path)[every], good)


def test_one_flipped_bit_of_a_cache_is_noticed(tmp_path, capsys):
    """In the pixels, their header, their digest or the notes: all is as if nothing had happened."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(root / f"{i}.png")
    (root / "1.png").write_bytes(b"broken")
    names = [f"{i}.png" for i in (0, 2, 3, 4, 5)]
    good = pixels_of(root, 8, tmp_path / "c")[np.arange(5)]
    files = sorted((tmp_path / "c").glob("*/*"))
    assert [file.name for file in files] == ["00000.json", "00000.npy"]
    g = np.random.default_rng(0)
    for file in files:
        data = file.read_bytes()
        ends = [0, 20, 100, 130, len(data) - 40, len(data) - 1]
        for at in [*ends, *g.integers(0, len(data), 30).tolist()]:
            at = min(at, len(data) - 1)
            changed = bytearray(data)
            changed[at] ^= 1 << int(g.integers(8))
            file.write_bytes(changed)
            capsys.readouterr()
            found = pixels_of(root, 8, tmp_path / "c")
            assert found.images.names == names and np.array_equal(found[np.arange(5)], good)
            assert "damaged" in capsys.readouterr().out, (file, at)
            assert file.read_bytes() == data
    files[0].unlink()  # the notes are gone: 1.png would be used
    assert pixels_of(root, 8, tmp_path / "c").images.names == names


def test_nothing_is_written_through_links_in_a_cache(tmp_path, faces):
    pixels_of(faces, 16, tmp_path / "c")
    (data,) = (tmp_path / "c").glob("*/*.npy")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    data.unlink()
    data.symlink_to(mine)
    pixels_of(faces, 16, tmp_path / "c")
    assert mine.read_text() == "mine" and not data.is_symlink()
    folder = data.parent.rename(tmp_path / "elsewhere")
    (folder / data.name).write_text("mine")
    data.parent.symlink_to(folder)
    with pytest.raises(UserError, match="link"):
        pixels_of(faces, 16, tmp_path / "c")
    assert (folder / data.name).read_text() == "mine"


def test_what_is_skipped_is_said_at_every_start(tmp_path, capsys):
    """From the cache, too; its reasons are stored with it."""
    for i in range(3):
        Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    for _ in range(2):
        pixels = pixels_of(tmp_path, 8, tmp_path / ".c")
        assert pixels.images.names == ["0.png", "2.png"]
        assert pixels[np.arange(2)][:, 0, 0, 0].tolist() == [0, 100]
        assert "1 of 3 images cannot be used" in capsys.readouterr().out


def test_caches_of_the_first_edition_do_no_harm(tmp_path, faces):
    """They had one file of pixels and one of indices under the same key."""
    images = folder_set(faces)
    good = Pixels(images, 16, tmp_path)[np.arange(120)]
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    (tmp_path / f"{folder.name}.u8").write_bytes(bytes(120 * 16 * 16 * 3))
    (tmp_path / f"{folder.name}.json").write_text('{"kept": [0], "skipped": []}')
    assert np.array_equal(Pixels(images, 16, tmp_path)[np.arange(120)], good)


def _build_cache(root, folder):
    assert len(pixels_of(root, 48, Path(folder))) == 120


def test_several_builders_and_a_killed_one(faces, tmp_path):
    """Five processes at once, after one was killed midway: one cache, complete, and no leftovers."""
    spawn = multiprocessing.get_context("fork")
    slow, started = tmp_path / "slow", spawn.Event()
    slow.mkdir()
    victim = spawn.Process(target=_slow_build, args=(faces, slow, started))
    victim.start()
    assert started.wait(30)
    time.sleep(0.3)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert list(slow.glob("*/.*.tmp")) and not list(slow.glob("*/*.npy"))
    several = [spawn.Process(target=_build_cache, args=(faces, slow)) for _ in range(5)]
    for p in several:
        p.start()
    for p in several:
        p.join(60)
    assert [p.exitcode for p in several] == [0] * 5
    assert sorted(f.name for f in slow.glob("*/*")) == ["00000.json", "00000.npy"]


def _slow_build(root, folder, started):
    images = folder_set(Path(root))
    read = images.read

    def slowly(*args):
        started.set()
        time.sleep(0.05)
        return read(*args)

    object.__setattr__(images, "read", slowly)
    Pixels(images, 48, Path(folder), workers=1)


def test_too_little_disk(tmp_path, faces, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000}))
    with pytest.raises(UserError, match="--no_cache"):
        pixels_of(faces, 16, tmp_path)
    assert not list(tmp_path.glob("*/*"))


# --- batches ----------------------------------------------------------------------------------------


def test_held_out_is_a_function_of_the_names():
    names = [f"{i}.png" for i in range(1000)]
    train, held = held_out(names)
    assert len(held) == 20 and sorted([*train, *held]) == list(range(1000))
    assert (
        len(held_out(names[:99])[1]) == 0
        and len(held_out([str(i) for i in range(50_000)])[1]) == 256
    )
    shuffled = list(reversed(names))
    assert {shuffled[i] for i in held_out(shuffled)[1]} == {names[i] for i in held}


def test_order_is_one_permutation_per_epoch(faces):
    batches = Batches(pixels_of(faces), 7, seed=3)
    n = len(batches)
    assert n == 118 and len(batches.held_out) == 2
    seen = np.concatenate([batches.indices(s) for s in range(3 * n)])
    epochs = seen[: 7 * n * 3].reshape(-1, n)
    for epoch in epochs:
        assert sorted(epoch) == sorted(batches.train)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(batches.indices(40), seen[280:287])  # whatever was asked before
    other = Batches(batches.pixels, 7, seed=4)
    assert not np.array_equal(other.indices(0), batches.indices(0))


def test_batches_do_not_depend_on_how_they_are_cut(faces, tmp_path):
    batches = Batches(pixels_of(faces, cache_dir=tmp_path), 12, seed=0)
    whole = batches(5, 0, 12)
    parts = [batches(5, 0, 4, then=(5, 4, 12)), batches(5, 4, 12)]
    assert torch.equal(whole.pixels, torch.cat([p.pixels for p in parts]))
    assert torch.equal(whole.labels, torch.cat([p.labels for p in parts]))
    uncached = Batches(pixels_of(faces), 12, seed=0)(5, 0, 12)
    assert torch.equal(whole.pixels, uncached.pixels)
    assert whole.pixels.is_contiguous(memory_format=torch.channels_last)
    x = to_unit(whole.pixels, torch.device("cpu"))
    assert x.min() >= -1 and x.max() <= 1 and x.dtype == torch.float32


def test_flips_are_drawn_per_sample_and_step(faces):
    pixels = pixels_of(faces)
    plain, flipped = Batches(pixels, 64, 0, flip=False), Batches(pixels, 64, 0, flip=True)
    a, b = plain(2, 0, 64).pixels, flipped(2, 0, 64).pixels
    same = (a == b).flatten(1).all(1)
    mirrored = (a.flip(3) == b).flatten(1).all(1)
    assert (same | mirrored).all() and 16 < mirrored.sum() < 48


# --- archives and the hub ------------------------------------------------------------------------------


def test_cifar_binary_archive(tmp_path, monkeypatch):
    """The real layout, made here: label byte, then the red, green and blue planes."""
    folder = tmp_path / "made" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 255, (40, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    for i in range(2):
        rows[i * 20 : i * 20 + 20].tofile(folder / f"data_batch_{i + 1}.bin")
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setitem(sources.NAMED, "cifar10", (tmp_path / "c.tar.gz").as_uri())
    monkeypatch.chdir(tmp_path)
    images = open_data("cifar10")
    assert len(images) == 40 and images.classes == names and images.labels == rows[:, 0].tolist()
    assert np.array_equal(images.read(31, 32), rows[31, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(open_data("cifar10")) == 40  # from data/cifar10 now
    assert {p.name for p in Path("data").iterdir()} == {"cifar10", ".cifar10.lock"}


def test_a_failed_fetch_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 half of it")
    for url in ((tmp_path / "broken.zip").as_uri(), "http://127.0.0.1:9/afhq.zip"):
        monkeypatch.setitem(sources.NAMED, "afhq", url)
        with pytest.raises(UserError, match="data/afhq"):
            open_data("afhq")
    assert [p.name for p in Path("data").iterdir()] == [".afhq.lock"]


def picture_bytes(colour="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2"])
def test_an_archive_as_data(tmp_path, monkeypatch, kind):
    """Given by its path, which may begin with ~; unpacked once, captions and classes with it."""
    path = tmp_path / f"pets.{kind}"
    members = {f"pets/{c}/{i}.png": picture_bytes() for c in ("cat", "dog") for i in range(2)}
    members |= {"pets/cat/0.txt": b"a cat", "pets/run.py": b"import os"}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, data in members.items():
                z.writestr(name, data)
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as t:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in (str(path), f"~/{path.name}"):
        images = open_data(data, cache_dir=tmp_path / "c")
        assert images.names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
        assert images.classes == ["cat", "dog"] and images.captions == ["a cat", "", "", ""]
    assert len([p for p in (tmp_path / "c").iterdir() if p.is_dir()]) == 1
    assert not list(tmp_path.rglob("run.py"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=path.name):
        open_data(str(path), cache_dir=tmp_path / "d")
    assert not [p for p in (tmp_path / "d").iterdir() if p.is_dir()]


def tar_member(name="x.png", data=b"", size=None, kind=tarfile.REGTYPE, link="") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    if size is not None:  # base 256, of which negative numbers can be
        block[124:136] = (size % (1 << 96)).to_bytes(12, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def pax(text: bytes) -> bytes:
    return tar_member("p", b"%d %s\n" % (len(text) + 4, text), kind=tarfile.XHDTYPE)


@pytest.mark.parametrize(
    "hostile",
    [
        tar_member(size=-512),
        tar_member(size=1 << 60),
        pax(b"size=-1024") + tar_member(),
        pax(b"path=../../escaped.png") + tar_member(data=b"x"),
        tar_member("../escaped.png", b"x"),
        tar_member("/escaped.png", b"x"),
        tar_member("C:\\escaped.png", b"x"),
        tar_member("..\\escaped.png", b"x"),
        tar_member("a" * 90 + "/" + "b" * 5, b"x") * 2,
        tar_member("f", kind=tarfile.SYMTYPE, link="..") + tar_member("f/escaped.png", b"x"),
        tar_member("l.png", kind=tarfile.SYMTYPE, link="/etc/passwd") + tar_member("l.png", b"x"),
        tar_member("h.png", kind=tarfile.LNKTYPE, link="../../escaped.png"),
        *(tar_member("d.png", kind=kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE)),
        tar_member("0.png/0.png", b"x") + tar_member("0.png", b"y"),
        pax(b"GNU.sparse.realsize=9999999999") + tar_member(),
    ],
)
def test_hostile_members_of_an_archive(tmp_path, hostile):
    """Nothing but regular files below the folder, whatever the version of Python."""
    good = tar_member("0.png", picture_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(good + hostile + good[:512] * 0 + bytes(1024))
    began = time.monotonic()
    try:
        open_data(str(tmp_path / "in" / "a.tar"), cache_dir=tmp_path / "c" / "d")
    except UserError as error:
        assert "a.tar" in str(error)
    assert time.monotonic() - began < 10
    every = [p for p in tmp_path.rglob("*") if p.name != "a.tar"]
    assert not any(p.is_symlink() or not (p.is_dir() or p.is_file()) for p in every)
    found = [p for p in every if p.is_file() and p.suffix == ".png"]
    inside = [p for p in found if p.is_relative_to(tmp_path / "c" / "d")]
    assert found == inside and sum(p.stat().st_size for p in found) < 4096


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_GET(self):
        kind = self.path.strip("/")
        self.send_response({"missing": 404, "file": 302}.get(kind, 200))
        lengths = {"words": "abc", "negative": "-5", "short": "999", "figures": "\xb2"}
        if kind in lengths:
            self.send_header("Content-Length", lengths[kind])
        if kind == "file":
            self.send_header("Location", "file:///etc/passwd")
        if kind == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for _ in range(10**6 if kind == "endless" else 1):
                self.wfile.write(b"<html>no archive</html>" * 99)
        except OSError:
            pass

    def log_message(self, *args):
        pass


def test_odd_answers_of_a_server(tmp_path, monkeypatch):
    """One line, nothing left, nothing without an end; also for what is not the pinned file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(archives, "MAX_DOWNLOAD", 1 << 22)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kinds = "words negative short figures file chunks endless missing html pinned".split()
    for kind in kinds:
        url = f"http://127.0.0.1:{server.server_port}/{kind}"
        monkeypatch.setitem(sources.NAMED, "afhq", url)
        monkeypatch.setitem(sources.SHA256, url, "0" * 64 if kind == "pinned" else None)
        with pytest.raises(UserError, match="data/afhq") as told:
            open_data("afhq")
        assert "\n" not in str(told.value)
    server.shutdown()
    assert [p.name for p in Path("data").iterdir()] == [".afhq.lock"]


def test_class_names_of_cifar_are_its_own(tmp_path):
    """They become the model's; no file of the folder says them."""
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073 * 2))
    (tmp_path / "private").write_text("a b c d e f g h i j")
    (tmp_path / "batches.meta.txt").symlink_to(tmp_path / "private")
    images = open_data(str(tmp_path))
    assert images.classes[0] == "airplane" and images.captions == ["a photo of a airplane"] * 2


def test_rows_of_a_hub_set_name_no_files_of_yours(tmp_path, parquet, monkeypatch):
    """Neither by an absolute path nor by one that leads out; files of the set itself are read."""
    library = pytest.importorskip("datasets")
    (tmp_path / "private.png").write_bytes(picture_bytes())
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "own.png").write_bytes(picture_bytes())
    paths = [tmp_path / "private.png", folder / ".." / "private.png", folder / "own.png"]
    features = library.Features({"image": library.Image()})
    made = library.Dataset.from_dict({"image": list(map(str, paths))}, features=features)
    made.to_parquet(folder / "train.parquet")
    images = open_data(f"hf:{folder}")
    for i in (0, 1):
        with pytest.raises(BadImage, match="private.png"):
            images.read(i, 8)
    assert images.read(2, 8).shape == (8, 8, 3)


def test_what_a_killed_fetch_has_left_is_removed(tmp_path, monkeypatch):
    """Not what a link of that name leads to."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    for folder in ("data/.afhq.0123456789abcdef.tmp", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "archive").write_text("mine")
    link = ".afhq.fedcba9876543210.tmp"
    (tmp_path / "data" / link).symlink_to(mine)
    with zipfile.ZipFile("a.zip", "w") as z:
        z.writestr("cat/0.png", picture_bytes())
    monkeypatch.setitem(sources.NAMED, "afhq", (tmp_path / "a.zip").as_uri())
    assert len(open_data("afhq")) == 1
    left = {p.name for p in Path("data").iterdir()}
    assert left == {"afhq", ".afhq.lock", link} and (mine / "archive").exists()


def test_hub_set_downloaded(parquet):
    root, files = parquet
    images = open_data(f"hf:{root}")
    assert len(images) == 360 and images.classes == ["a", "b"] and images.labels[:3] == [0, 1, 0]
    assert images.captions[17] == "caption 17"
    assert np.array_equal(images.read(200, 16), read_image(files[200], 16))


def test_hub_stream(parquet, monkeypatch):
    """Every image once an epoch, in shuffled blocks; any step can be asked for first."""
    root, files = parquet
    monkeypatch.setattr(StreamBatches, "BLOCK", 50)
    monkeypatch.setattr(StreamBatches, "HELD_OUT", 60)
    stream = StreamBatches(HubSet(str(root), True), 16, 20, seed=0, flip=False)
    assert stream.length is None and len(stream.held_out) == 60
    steps = [stream(s, 0, 20).pixels for s in range(30)]  # two epochs of 15
    assert stream.length == 300
    key = lambda x: x.numpy().tobytes()
    wanted = sorted(
        key(torch.from_numpy(read_image(f, 16)).permute(2, 0, 1).contiguous()) for f in files[60:]
    )
    for epoch in (steps[:15], steps[15:]):
        assert sorted(key(p.contiguous()) for batch in epoch for p in batch) == wanted
    assert not torch.equal(steps[0], steps[15])
    resumed = StreamBatches(HubSet(str(root), True), 16, 20, seed=0, flip=False)
    resumed.length = 300  # from the checkpoint
    for s in (8, 9, 22):
        assert torch.equal(resumed(s, 0, 20).pixels, steps[s])
    half = [resumed(9, 0, 10).pixels, resumed(9, 10, 20).pixels]
    assert torch.equal(torch.cat(half), steps[9])


def test_hub_errors(tmp_path, monkeypatch):
    library = pytest.importorskip(
        "datasets", reason="optional extra not installed: pip install datasets"
    )
    table = library.Dataset.from_dict({"words": ["a"]})
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="words"):
        open_data(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        open_data(f"hf:{tmp_path / 'nowhere'}")
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name))
                        if name == "datasets" else real(name, *a, **k))  # fmt: skip
    with pytest.raises(UserError, match="pip install datasets"):
        open_data("hf:someone/something")


def test_the_errors_are_one_line_for_a_user(tmp_path):
    done = warm.script("train.py", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: --data 'nowhere'")
    assert "Traceback" not in done.stderr
    assert digest("a") != digest("b")


def test_an_archive_is_the_same_set_at_every_opening(tmp_path, monkeypatch):
    """AFHQ's zip holds one folder, afhq/train/cat/...; it is taken off once, when unpacked."""
    with zipfile.ZipFile(tmp_path / "afhq.zip", "w") as z:
        for name in ("afhq/train/cat/1.png", "afhq/train/dog/1.png", "afhq/val/cat/2.png"):
            image = tmp_path / "i.png"
            Image.new("RGB", (8, 8)).save(image)
            z.write(image, name)
        z.writestr("__MACOSX/x", "")
    monkeypatch.setitem(sources.NAMED, "afhq", (tmp_path / "afhq.zip").as_uri())
    monkeypatch.chdir(tmp_path)
    first, second = open_data("afhq"), open_data("afhq")
    assert first.names == second.names == ["cat/1.png", "dog/1.png"] and first.classes == [
        "cat",
        "dog",
    ]
    assert len(open_data("afhq", data_class="cat")) == 1


def test_data_class_holds_for_every_kind_of_set(parquet):
    root, _ = parquet
    assert set(open_data(f"hf:{root}", data_class="a").labels) == {0}
    with pytest.raises(UserError, match="a, b"):
        open_data(f"hf:{root}", data_class="cat")


@pytest.mark.parametrize("n, batch", [(300, 120), (300, 50), (310, 130)])
def test_stream_length_is_found_wherever_one_reads_first(parquet, monkeypatch, n, batch):
    """A rank whose first sample lies beyond the end learns the same length as the others."""
    root, _ = parquet
    monkeypatch.setattr(StreamBatches, "BLOCK", 50)
    monkeypatch.setattr(StreamBatches, "HELD_OUT", 360 - n)
    whole, late = (StreamBatches(HubSet(str(root), True), 16, batch, seed=0) for _ in range(2))
    pictures = [whole(s, 0, batch).pixels for s in range(8)]
    assert torch.equal(late(4, batch // 2, batch).pixels, pictures[4][batch // 2 :])
    late(7, 0, 1)
    assert whole.length == late.length == n


def test_a_stand_in_brings_its_own_label(tmp_path):
    for name, kind in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), kind).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    batches = Batches(pixels_of(tmp_path, 8), 3, seed=0, flip=False)
    batch = batches(0, 0, 3)
    assert (batch.labels == (batch.pixels[:, 2, 0, 0] > 100)).all()
