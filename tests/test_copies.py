"""--copies: against brute force, and for samples of which the answer is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.data.batches import open_batches
from diffusion.evaluation import __main__ as evaluation
from diffusion.evaluation import copies
from diffusion.evaluation.copies import nearest, nearness
from diffusion.evaluation.features import open_features

SIZE = 32


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """(320, 32, 32, 3): blocks of random colours."""
    random = np.random.RandomState(0)
    blocks = random.randint(30, 225, (320, 8, 8, 3), np.uint8)
    return blocks.repeat(4, 1).repeat(4, 2)


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory) -> tuple[Path, Path]:
    """REAL of 320 images, and TRAIN of the first 90 of them, too few to hold any out."""
    root = tmp_path_factory.mktemp("sets")
    return write(root / "real", images), write(root / "train", images[:90])


@pytest.fixture
def measure(monkeypatch, capsys):
    def call(real: Path, fake: Path, train: Path, *more) -> dict:
        args = [real, fake, "--copies", train, "--size", SIZE, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, args)])
        evaluation.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def pooled(images: np.ndarray) -> np.ndarray:
    """16x16 pixels of 0 to 1, and (N, 768)."""
    means = images.reshape(-1, 16, SIZE // 16, 16, SIZE // 16, 3).mean((2, 4), dtype=float)
    return means.reshape(len(images), -1) / 255


def brute(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.array([min(np.sqrt(((x - y) ** 2).sum()) for y in others) for x in points])


@pytest.mark.parametrize("mirrored", [False, True])
def test_training_images_with_noise_are_copies(images, folders, measure, tmp_path, mirrored):
    random = np.random.RandomState(1)
    noisy = images[:90] + random.randint(-20, 21, images[:90].shape)
    noisy = noisy.astype(np.uint8)[:, :, :: -1 if mirrored else 1]
    found = measure(folders[0], write(tmp_path / "noisy", noisy), folders[1])
    assert found["copies"] == 1 and found["features"] == "16x16 pixels"
    about = found["definitions"]["copies"]
    assert about["num_held_out"] == 230 and about["nearest_train"] < about["nearest_held_out"] / 5
    picture = Image.open("results/metrics/copies.png")
    # each noisy image stands above an image that differs by the noise alone, or is its mirror image
    cells = np.asarray(picture)[-2 * (3 * SIZE + 4) :].astype(int)
    above, below = (cells[row * (3 * SIZE + 4) + 10, 14] for row in (0, 1))
    assert mirrored or abs(above - below).max() <= 20


def test_held_out_images_are_one_percent(images, folders, measure, tmp_path):
    """Of 200 held-out images' own distances just 2 are below their 1 % quantile."""
    real = write(tmp_path / "real", np.concatenate([images[90:290], images[:90]]))
    found = measure(real, write(tmp_path / "held", images[90:290]), folders[1])
    assert found["copies"] == 2 / 200
    assert found["definitions"]["copies"]["num_held_out"] == 200


def test_against_brute_force(images, folders, measure, tmp_path, monkeypatch):
    random = np.random.RandomState(2)
    mixed = images[:60] * 0.5 + images[random.randint(90, 320, 60)] * np.linspace(0, 0.5, 60)[:, None, None, None]  # fmt: skip
    mixed = mixed.astype(np.uint8)
    fake = write(tmp_path / "fake", mixed)
    found = measure(folders[0], fake, folders[1])
    train = np.concatenate([pooled(images[:90]), pooled(images[:90, :, ::-1])])
    usual = brute(pooled(images[90:]), train)
    own = brute(pooled(mixed), train)
    about = found["definitions"]["copies"]
    assert 0 < found["copies"] < 1
    assert_close(found["copies"], float((own < np.quantile(usual, 0.01)).mean()))
    assert_close(about["nearest_train"], float(np.sort(own)[29]), rtol=1e-5, atol=0)
    others = float(np.sort(brute(pooled(mixed), pooled(images[90:])))[29])
    assert_close(about["nearest_held_out"], others, rtol=1e-5, atol=0)
    # in small pieces: the same, and no table of all distances
    asked = []
    cdist = torch.cdist
    monkeypatch.setattr(copies, "CHUNK", 7)
    monkeypatch.setattr(torch, "cdist", lambda a, b: asked.append(len(a)) or cdist(a, b))
    again = measure(folders[0], fake, folders[1], "--overwrite")
    assert_close(again["copies"], found["copies"])
    assert_close(again["definitions"]["copies"]["nearest_train"], about["nearest_train"])
    assert Path("results/metrics/copies.png").is_file()
    assert not Path("results/metrics/copies_2.png").exists() and asked.count(7) > 20


def test_nearest_is_that_of_the_definition():
    points, others = torch.randn(600, 5).double(), torch.randn(40, 5).double()
    every = (points[:, None] - others).norm(dim=2)
    assert_close(nearest(points, others), every.min(1).values, rtol=1e-6, atol=1e-6)


def test_held_out_are_those_of_training(images, measure, tmp_path):
    """REAL = TRAIN: what training holds out of 320 images is 6, too few."""
    folder = write(tmp_path / "all", images)
    with pytest.raises(UserError, match="6 images of REAL are not trained on"):
        measure(folder, folder, folder)


def test_options_that_do_not_go_together(folders, measure, tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match="--copies: no effect without a folder FAKE"):
        measure(folders[0], tmp_path / "model.pt", folders[1])
    with pytest.raises(UserError):
        measure(folders[0], folders[1], tmp_path / "none")


def test_nearness_of_training_images(images, monkeypatch):
    """Each against the others and their mirror images, but its own; in chunks of any size."""
    own = pooled(images[:50])
    mirrored = pooled(images[:50, :, ::-1])
    expected = [
        brute(own[i : i + 1], np.delete(np.concatenate([own, mirrored]), [i, 50 + i], 0))[0]
        for i in range(50)
    ]
    monkeypatch.setattr(copies, "CHUNK", 7)
    none = own[:0]
    for again, mirror in ((none, none), (own[:20], mirrored[:20]), (mirrored[:20], own[:20])):
        train = torch.from_numpy(np.concatenate([own, again, mirrored, mirror]))
        known = np.quantile(expected + expected[: len(again)], 0.01)
        assert_close(float(nearness(train)), known)  # an image another time changes nothing
    assert nearness(torch.ones(6, 5, dtype=torch.float64)) == 0


def test_ranks_share_the_features(images, folders, monkeypatch):
    data = open_batches(Config(data=str(folders[1]), image_size=SIZE, cache=False))
    features = open_features("pixels", torch.device("cpu"))
    monkeypatch.setattr(copies, "CHUNK", 40)  # six chunks for four ranks
    whole = copies.features_of(data, features)
    for part, direction in ((whole[:90], 1), (whole[90:], -1)):
        expected = pooled(images[data.train][:, :, ::direction])
        channels_last = part.unflatten(1, (3, -1)).mT.flatten(1)
        assert_close(channels_last.numpy(), expected)
    monkeypatch.setattr(copies, "world_size", lambda: 4)
    parts = []
    for number in range(4):
        monkeypatch.setattr(copies, "rank", lambda number=number: number)
        parts.append(copies.features_of(data, features))
    assert torch.equal(sum(parts), whole) and not torch.equal(parts[0], whole)
