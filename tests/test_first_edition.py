"""Files of the first edition, commit 69aa47a: runs are continued, weights and adapters sampled.

assets/first_edition/files.tar.xz holds what its scripts wrote, and digests.json what they made of it
under another torch or CPU; make.py there makes both.
"""

import hashlib
import json
import os
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image
from safetensors.torch import load_file
from test_golden import CLOCK, machine, of_pictures, of_run
from torch.testing import assert_close

HERE = Path(__file__).parent / "assets" / "first_edition"
DIGESTS = json.loads((HERE / "digests.json").read_text()).get(machine())
with tarfile.open(HERE / "files.tar.xz") as tar:
    COMMANDS = json.load(tar.extractfile("commands.json"))
ENDS = {"run": "ema.safetensors", "lora": "adapter.safetensors"}
# what names an image cache beside the files of the set and the size; raised when pixels change
TRANSFORM = "exif, sRGB over white, central square, lanczos; 2"


def unpack(folder: Path) -> Path:
    with tarfile.open(HERE / "files.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("first"))


def call(script: str, options: str, folder: Path, cwd: Path):
    done = warm.script(script, *shlex.split(options), "--save_folder", folder, cwd=cwd)
    assert done.returncode == 0, f"{script} {options}: {done.stderr[-2000:]}"
    return done


def lines(folder: Path) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


@pytest.mark.parametrize("name", COMMANDS["runs"])
def test_a_run_is_continued(tmp_path, name):
    """Stopped at step 4 of 8, it ends with the bits of the run that never was."""
    root = unpack(tmp_path)
    before = lines(root / name)
    call("train.py", COMMANDS["runs"][name] + " --train_steps 8", root / name, root)
    found = lines(root / name)
    assert found[: len(before)] == before
    assert [line["step"] for line in found] == list(range(1, 9))
    if DIGESTS is not None:
        assert of_run(root / name) == DIGESTS[f"run: {name}"]
    expected = lines(root / f"{name}_end")
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=1e-3)
    weights = load_file(root / f"{name}_end" / ENDS[name])
    assert_close(load_file(root / name / ENDS[name]), weights, rtol=1e-3, atol=1e-4)


def test_the_weights_at_the_end_are_not_those_in_the_middle(files):
    """Else the test above would pass without a step."""
    for name, file in ENDS.items():
        middle, end = load_file(files / name / file), load_file(files / f"{name}_end" / file)
        moved = max((end[k] - middle[k]).abs().max().item() for k in end)
        assert moved > 2e-3, name


def pixels(folder: Path) -> np.ndarray:
    return np.stack(
        [np.array(Image.open(p)) for p in sorted((folder / "images").glob("*.png"))]
    ).astype(int)


@pytest.mark.parametrize("name", COMMANDS["pictures"])
def test_pictures_are_the_same(files, tmp_path, name):
    call("sample.py", COMMANDS["pictures"][name], tmp_path, files)
    if DIGESTS is not None:
        assert of_pictures((tmp_path / "images").glob("*.png")) == DIGESTS[f"pictures: {name}"]
    found, expected = pixels(tmp_path), pixels(files / "pictures" / name)
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 2


def digest(*parts: str) -> str:
    return hashlib.sha256(b"".join(os.fsencode(p) + b"\0" for p in parts)).hexdigest()[:32]


def cache_name(data: Path, size: int) -> str:
    """Name the cache of a folder's images as it has been named since pixels last changed."""
    images = sorted(data.rglob("*.png"))
    stats = [f"{p.stat().st_size} {p.stat().st_mtime_ns}" for p in images]
    stamp = digest(str(data.resolve()), *stats)
    return digest(stamp, TRANSFORM, str(size), *(p.relative_to(data).as_posix() for p in images))


def test_an_image_cache_is_left_alone_and_built_again(tmp_path):
    """The first edition's: <key>.u8 and <key>.json; ours is a folder of that key.

    69aa47a named its caches after version 1 of the pixels, which since then are converted to sRGB.
    """
    root = unpack(tmp_path)
    (old,) = (root / "cache").glob("*.u8")
    before = {path.name: path.read_bytes() for path in (root / "cache").glob(f"{old.stem}.*")}
    name, options = cache_name(root / "data", 8), COMMANDS["runs"]["run"] + " --train_steps 1"
    done = call("train.py", options, root / "built", root)
    assert "decoded 12 images" in done.stdout
    (built,) = (root / "cache" / name).glob("*.npy")
    found = np.load(built)
    # the same content: nothing in these images is converted
    assert found.tobytes() == before[old.name] and found.shape == (12, 8, 8, 3)
    after = {path.name: path.read_bytes() for path in (root / "cache").glob(f"{old.stem}.*")}
    assert after == before
    # these pixels are read, and not decoded again
    written = built.stat().st_mtime_ns
    done = call("train.py", options, root / "used", root)
    assert "decoded" not in done.stdout and built.stat().st_mtime_ns == written
    assert lines(root / "built")[0]["loss"] == lines(root / "used")[0]["loss"]
