"""Distances against closed forms and clean-fid, feature networks, the command, --fid."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from feature_networks import Inception, Pooled, pictures
from helpers import flags, run_lines
from PIL import Image
from resnet56 import write as write_resnet56
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.data import toy
from diffusion.evaluation import __main__ as metrics
from diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from diffusion.evaluation.features import (
    INCEPTION,
    Features,
    cache_folder,
    name_of,
    open_features,
)
from diffusion.evaluation.fid import Fid, read_moments
from diffusion.evaluation.image_batches import collect, folder_batches
from diffusion.files.checkpoint import save_weights
from diffusion.files.tensors import write_tensors
from diffusion.runtime.seeding import permutation
from diffusion.sampling.load import build_network
from diffusion.training.finetune_config import resolve_config
from diffusion.training.trainer import train

CPU = torch.device("cpu")


def normal(*shape, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


# --- pure functions ------------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    value = frechet_distance(torch.zeros(3).double(), a.diag(), mean, b.diag())
    expected = (mean**2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert_close(value, float(expected), rtol=1e-12, atol=0)


def test_frechet_distance_of_rotated_and_singular_gaussians():
    q = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.rand(6).double() + 0.1, torch.rand(6).double()
    b[:3] = 0  # fewer images than features
    turn = lambda d: q @ d.diag() @ q.T  # noqa: E731
    zero = torch.zeros(6).double()
    expected = float(((a.sqrt() - b.sqrt()) ** 2).sum())
    assert_close(frechet_distance(zero, turn(a), zero, turn(b)), expected, rtol=1e-7, atol=1e-7)
    assert_close(frechet_distance(zero, turn(b), zero, turn(a)), expected, rtol=1e-7, atol=1e-7)
    assert abs(frechet_distance(zero, turn(b), zero, turn(b))) < 1e-7


def test_frechet_distance_of_covariances_that_do_not_commute():
    """For 2x2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))."""
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()  # fmt: skip
    m = a @ b
    root = (m.trace() + 2 * torch.linalg.det(m).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    expected = float(a.trace() + b.trace() - 2 * root)
    assert_close(frechet_distance(zero, a, zero, b), expected, rtol=1e-12, atol=0)


def test_frechet_and_kernel_distance_are_clean_fids():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = normal(300, 24), normal(200, 24, seed=1) * 1.3 + 0.2
    theirs = fid.frechet_distance(*(v.numpy() for v in (*moments(a), *moments(b))))
    assert_close(frechet_distance(*moments(a), *moments(b)), float(theirs), rtol=1e-8, atol=0)
    np.random.seed(5)
    theirs = fid.kernel_distance(a.numpy(), b.numpy(), num_subsets=7, max_subset_size=150)
    ours = kernel_distance(a, b, subsets=7, max_size=150, seed=5)
    assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_kernel_distance_is_unbiased():
    """Zero on average for two samples of one distribution, and not for two."""
    same = [kernel_distance(normal(60, 4, seed=i), normal(60, 4, seed=100 + i), 1) for i in range(80)]  # fmt: skip
    assert abs(np.mean(same)) < 3 * np.std(same) / 80**0.5
    assert kernel_distance(normal(60, 4), normal(60, 4, seed=1) + 1, 1) > 10 * np.std(same)


def test_moments_of_pieces():
    x = normal(100, 5) + 3
    found = Moments(5)
    for part in x.split(17):
        found.add(part)
    assert_close(found.reduce(), moments(x), rtol=1e-10, atol=1e-12)


def test_precision_and_recall():
    real, far = normal(200, 3), normal(200, 3, seed=1) + 100
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, far) == (0.0, 0.0)
    # a generator that knows one of two modes: all it makes is real, half of what is real it makes
    two = torch.cat([normal(200, 3, seed=2), normal(200, 3, seed=3) + 100])
    precision, recall = precision_recall(two, two[:200] + 1e-9)
    assert precision == 1.0 and recall == 0.5
    # against the definition, written out
    a, b = normal(40, 2, seed=4), normal(30, 2, seed=5)
    radius = [sorted(float((x - y).norm()) for y in a)[3] for x in a]
    inside = [any((y - x).norm() <= r for x, r in zip(a, radius)) for y in b]
    assert_close(precision_recall(a, b)[0], sum(inside) / 30)


def test_inception_score():
    sure = torch.eye(8).double().repeat(20, 1)
    assert_close(inception_score(sure, 1), (8.0, 0.0))
    assert_close(inception_score(torch.full((50, 8), 1 / 8).double()), (1.0, 0.0))
    p = normal(40, 6).softmax(1)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert_close(inception_score(p, 1)[0], float(kl.exp()))


# --- feature networks ----------------------------------------------------------------------------


def folder_features(folder: Path, features: Features) -> torch.Tensor:
    batches = folder_batches(folder, sorted(folder.iterdir()), None)
    return collect(batches, lambda numbers, given, images: {"f": features(images)}, folder)["f"]


@pytest.fixture
def inception(tmp_path, monkeypatch) -> Inception:
    """A network of the Inception file's interface, where ours looks for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    cache_folder().mkdir(parents=True)
    torch.manual_seed(0)
    network = Inception()
    torch.jit.script(network).save(str(cache_folder() / INCEPTION))
    trust(cache_folder() / INCEPTION, monkeypatch)
    return network


def trust(file: Path, monkeypatch) -> None:
    """Take a file for the published network."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr("diffusion.evaluation.features.INCEPTION_SHA256", digest)


def test_features_are_clean_fids(inception, real):
    """The same resize, the same order of channels, the same scaling."""
    fid = pytest.importorskip("cleanfid.fid")
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W(str(cache_folder()), download=False).eval()
    theirs = fid.get_folder_features(str(real), network, num_workers=0, device=CPU, verbose=False)
    features = open_features(None, CPU)
    ours = folder_features(real, features)
    assert features.name == "fid"
    assert_close(ours, torch.from_numpy(theirs).double(), rtol=0, atol=1e-6)
    expected = (ours @ inception.output.weight.double().T).softmax(1)
    assert_close(features.probabilities(ours), expected)


def test_a_network_of_ones_own(pooled, real):
    features = open_features(str(pooled), CPU)
    found = folder_features(real, features)
    assert features.name == "pooled" and found.shape == (40, 24)
    x = torch.from_numpy(np.stack([toy.draw(i, 16) for i in range(40)])).permute(0, 3, 1, 2)
    assert_close(found, Pooled()(x).double())
    assert features.probabilities(found) is None


def test_a_network_is_never_called_fid(tmp_path, pooled):
    for name in ("fid", "FID", "loss", "kid", "features", "skipped", "num_real"):
        assert name_of(str(tmp_path / f"{name}.pt")) == f"{name}_features"
    assert name_of(None) == "fid" and name_of("a/clip.pt") == "clip"


class Raises(nn.Module):
    """Ends every call with a long text, as a file of somebody's may."""

    def __init__(self):
        super().__init__()
        self.text: str = "\x1b[31m" + "error: " * 900

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError(self.text)


def test_missing_and_broken_networks(tmp_path, monkeypatch, real):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "http://127.0.0.1:9/none.pt")
    with pytest.raises(UserError, match=rf"put it at {cache_folder() / INCEPTION}"):
        open_features(None, CPU)
    assert not any(cache_folder().glob("*"))  # half a file would be taken for a whole one
    (cache_folder() / INCEPTION).write_bytes(b"PK\3\4 half of it")
    with pytest.raises(UserError, match="delete it"):
        open_features(None, CPU)
    with pytest.raises(UserError, match="No such file"):
        open_features(str(tmp_path / "no.pt"), CPU)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match=r"pipe\.pt"):
        open_features(str(tmp_path / "pipe.pt"), CPU)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as TorchScript"):
        open_features(str(tmp_path / "text.pt"), CPU)
    torch.jit.script(nn.Identity()).save(str(tmp_path / "identity.pt"))
    with pytest.raises(UserError, match=r"expected a tensor \(N, D\)"):
        folder_features(real, open_features(str(tmp_path / "identity.pt"), CPU))
    torch.jit.script(nn.Linear(3, 4)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(UserError, match="cannot use images of"):
        folder_features(real, open_features(str(tmp_path / "linear.pt"), CPU))
    torch.jit.script(Raises()).save(str(tmp_path / "raises.pt"))
    with pytest.raises(UserError, match="cannot use images of") as told:
        folder_features(real, open_features(str(tmp_path / "raises.pt"), CPU))
    assert (
        len(str(told.value)) < 700 and "\n" not in str(told.value) and "\x1b" not in str(told.value)
    )


def test_a_broken_connection_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))

    class Half(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 500)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/network.pt"
        monkeypatch.setattr("cleanfid.downloads_helper.inception_url", url)
        with pytest.raises(UserError, match="could not be fetched"):
            open_features(None, CPU)
        server.shutdown()
    assert list(cache_folder().iterdir()) == []


def test_the_download_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    source = tmp_path / "source.pt"
    torch.jit.script(Inception()).save(str(source))
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", source.as_uri())
    with pytest.raises(UserError, match="SHA-256"):  # not what was published
        open_features(None, CPU)
    (cache_folder() / INCEPTION).unlink()
    trust(source, monkeypatch)
    assert open_features(None, CPU).is_inception
    assert (cache_folder() / INCEPTION).read_bytes() == source.read_bytes()
    assert list(cache_folder().iterdir()) == [cache_folder() / INCEPTION]


def test_a_flipped_bit_in_cached_statistics_is_noticed(tmp_path):
    file = tmp_path / "a.safetensors"
    mean, cov = torch.randn(3).double(), torch.randn(3, 3).double()
    write_tensors(file, {"mean": mean, "cov": cov}, {})
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 5):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
        found = read_moments(file)
        assert found is None or (found[0].equal(mean) and found[1].equal(cov))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch, capsys):
    """python -m diffusion.evaluation in this process: (its JSON line, what it printed)."""

    def call(*args) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", ["metrics", *map(str, args), "--device", "cpu"])
        metrics.main()
        out = capsys.readouterr()
        return json.loads(out.out.splitlines()[-1]), out.out

    return call


def test_two_folders(real, pooled, tmp_path, measure):
    fake = pictures(tmp_path / "fake", range(50, 80))
    found, told = measure(real, fake, "--fid_features", pooled)
    assert found["num_real"] == 40 and found["num_fake"] == 30 and "mostly bias" in told
    features = open_features(str(pooled), CPU)
    a, b = (folder_features(f, features) for f in (real, fake))
    assert_close(found["pooled"], frechet_distance(*moments(a), *moments(b)))
    assert_close(found["pooled_kid"], kernel_distance(a, b))
    assert "fid" not in found and "inception_score" not in found
    same, _ = measure(real, real, "--fid_features", pooled)
    assert abs(same["pooled"]) < 1e-8 and same["precision"] == same["recall"] == 1


@pytest.mark.slow
def test_inception_gives_fid_kid_and_score(real, inception, tmp_path, measure):
    found, _ = measure(real, pictures(tmp_path / "fake", range(50, 90), 20))
    assert {"fid", "kid", "precision", "recall", "inception_score"} <= set(found)
    assert "Inception" in found["features"]


def test_grey_and_unreadable_images(real, pooled, tmp_path, measure):
    fake = pictures(tmp_path / "fake", range(20))
    for i in range(10):
        Image.fromarray(toy.draw(i, 16)).convert("L").save(fake / f"grey{i}.png")
    (fake / "broken.png").write_bytes(b"\x89PNG\r\n")
    found, told = measure(real, fake, "--fid_features", pooled)
    assert found["num_fake"] == 30 and "broken.png" in told


@pytest.mark.slow
def test_other_sizes(real, pooled, tmp_path, measure, inception):
    fake = pictures(tmp_path / "fake", range(20), 24)
    with pytest.raises(UserError, match=r"16x16, 24x24.*--size N"):
        measure(real, fake, "--fid_features", pooled)
    found, _ = measure(real, fake, "--fid_features", pooled, "--size", 8)
    assert found["num_fake"] == 20
    _, told = measure(real, fake)  # Inception resizes everything itself, but it matters
    assert "warning" in told and "16x16, 24x24" in told


def test_ten_images_and_fewer(real, pooled, tmp_path, measure):
    found, told = measure(real, pictures(tmp_path / "ten", range(10)), "--fid_features", pooled)
    assert "warning: 40 real and 10 generated images; below 2048" in told and found["pooled"] > 0
    with pytest.raises(UserError, match="40 real and 1 generated"):
        measure(real, pictures(tmp_path / "one", range(1)), "--fid_features", pooled)


def test_jpeg_is_told(real, pooled, tmp_path, measure):
    fake = pictures(tmp_path / "fake", range(5))
    Image.fromarray(toy.draw(1, 16)).save(fake / "a.jpg")
    assert "JPEG" in measure(real, fake, "--fid_features", pooled)[1]


def test_wrong_folders_and_samplers(real, pooled, tmp_path, measure, model):
    (tmp_path / "empty").mkdir()
    network = ("--fid_features", pooled)
    unconditional = tmp_path / "plain.safetensors"
    config = Config(image_size=16, unet_dim=8, dim_mults=(1, 2), time_steps=20)
    save_weights(unconditional, build_network(config, 0).state_dict(), config, step=0, classes=[])
    for args, told in (
        ((real, tmp_path / "empty"), "no images of"),
        ((tmp_path / "empty", real), "no images of"),
        ((tmp_path / "none", real), "is no folder"),
        ((real, tmp_path / "none.pt"), "does not exist"),
        ((real, model, "--samplers", "rk45:5"), "rk45"),
        ((real, model, "--samplers", "ddim"), "such as ddim:50"),
        ((real, model, "--size", 24), "the model's images have 16 pixels"),
        ((real, model, "--num_images", 1), "num_images is 1; it must be at least 2"),
        ((real, unconditional, "--guidance_scale", 2), "no class label and no guidance"),
        ((pictures(tmp_path / "one", [1]), model), "holds 1 usable image"),
    ):
        with pytest.raises(UserError, match=told):
            measure(*args, *network)


@pytest.mark.slow
def test_quality_against_evaluations(real, pooled, tmp_path, measure, model):
    args = (real, model, "--fid_features", pooled, "--num_images", 12, "--batch_size", 5,
            "--samplers", "ddim:3,ddpm:20,ddim:10", "--seeds", "0,1,2", "--amp", "no",
            "--save_folder", tmp_path)  # fmt: skip
    found, told = measure(*args)
    rows = found["rows"]
    assert [(r["sampler"], r["steps"]) for r in rows] == [("ddim", 3), ("ddpm", 20), ("ddim", 10)]
    for row in rows:
        assert len(set(row["pooled_of_seeds"])) == 3
        assert row["pooled"] == sorted(row["pooled_of_seeds"])[1]
    text = (tmp_path / "metrics" / "quality.json").read_text()
    assert json.loads(text) == found and str(tmp_path) not in text
    assert Image.open(tmp_path / "metrics" / "quality.png").size == (640, 400)
    assert "ddpm    20 steps  pooled" in told
    # it is the distance of what sample.py writes
    done = warm.script("sample.py", "--load_path", model, "--save_folder", tmp_path / "s", "--sampler", "ddim", "--steps", 3,
                  "--num_images", 12, "--batch_size", 5, "--class_label", "all", "--seed", 1,
                  "--amp", "no", "--device", "cpu", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    again, _ = measure(real, tmp_path / "s" / "images", "--fid_features", pooled)
    assert_close(again["pooled"], rows[0]["pooled_of_seeds"][1], rtol=1e-6, atol=0)


def test_two_ranks_measure_the_same(real, pooled, tmp_path, model):
    mixed = pictures(pictures(tmp_path / "mixed", range(12)), range(1, 12, 2), 24)
    (mixed / "001.png").write_bytes(b"broken")
    args = [real, model, "--fid_features", pooled, "--num_images", "10", "--batch_size", "3",
            "--samplers", "ddim:3", "--amp", "no", "--device", "cpu"]  # fmt: skip
    values, program = [], "diffusion.evaluation.metrics"
    for ranks in (0, 2):
        done = warm.script(program, *args, "--save_folder", tmp_path, cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(done.stdout.splitlines()[-1])["rows"][0]["pooled"])
    assert_close(values[0], values[1], rtol=1e-6, atol=0)
    # what the other rank has seen counts too
    done = warm.script(program, real, mixed, "--fid_features", pooled, cwd=tmp_path, ranks=2)
    assert done.returncode != 0 and "images of 2 sizes" in done.stderr and "001.png" in done.stdout


@pytest.mark.slow
def test_the_reference_tool_gives_the_same_number(real, tmp_path, measure):
    """tools/frechet.py, where the shared folder stands beside the checkout."""
    shared = ROOT.parent / "shared"
    weights = shared / "weights" / "cifar_resnet56.safetensors"
    if not weights.is_file():
        pytest.skip(f"needs {weights.relative_to(ROOT.parent)}")
    write_resnet56(str(weights), str(tmp_path / "resnet56.pt"))
    fake = pictures(tmp_path / "fake", range(60, 100))
    found, _ = measure(real, fake, "--size", 32, "--fid_features", tmp_path / "resnet56.pt")
    done = subprocess.run([sys.executable, shared / "tools" / "frechet.py", real, fake],
                          capture_output=True, text=True)  # fmt: skip
    theirs = float(done.stdout.split()[-1])  # of features 10 times as large, in effect
    assert_close(100 * found["resnet56"], theirs, rtol=1e-4, atol=1e-3)


# --- --fid ---------------------------------------------------------------------------------------


@pytest.fixture
def fid(tiny, pooled) -> dict:
    return tiny | dict(fid=True, fid_every=6, fid_num_images=10, fid_features=str(pooled))


def values_of(folder) -> dict[int, float]:
    lines = run_lines(Path(folder))
    assert all("fid_num_images" in line for line in lines if "pooled" in line)
    return {line["step"]: line["pooled"] for line in lines if "pooled" in line}


@pytest.mark.slow
def test_fid_during_training(fid, tmp_path, capsys):
    train(Config(**fid))
    first = values_of(tmp_path / "run")
    told = capsys.readouterr().out
    assert sorted(first) == [6, 12] and "dpmpp_2m in 20 steps" in told
    assert "118 training images at 16 px" in told and "step 12: pooled" in told

    # against the definition: these samples, the training images
    from diffusion.data.batches import open_batches
    from diffusion.pictures.grid import to_uint8
    from diffusion.sampling.load import load

    pipeline, data = load(tmp_path / "run" / "model.pt"), open_batches(Config(**fid))
    features = open_features(fid["fid_features"], CPU)
    order = permutation(118, 0, "fid")
    labels = torch.tensor([data.labels[data.train[order[i]]] for i in range(10)])
    assert len(set(labels.tolist())) == 3  # though the files come by class
    fake = to_uint8(pipeline.sample(range(10), sampler="dpmpp_2m", steps=20, labels=labels, amp="no"))  # fmt: skip
    a, b = features(data.pixels[data.train]), features(fake)
    assert_close(first[12], frechet_distance(*moments(a), *moments(b)), rtol=1e-4, atol=1e-6)

    # a second run finds the reference, and the number is the same
    train(Config(**fid | dict(save_folder=str(tmp_path / "second"))))
    assert "reference features" in capsys.readouterr().out
    assert values_of(tmp_path / "second") == first
    # a damaged reference is made anew
    [file] = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    train(Config(**fid | dict(save_folder=str(tmp_path / "third"))))
    assert "reference features" not in capsys.readouterr().out
    assert values_of(tmp_path / "third") == first
    save_file({"mean": torch.zeros(3), "sigma": torch.eye(3)}, file)
    train(Config(**fid | dict(save_folder=str(tmp_path / "fourth"))))
    assert values_of(tmp_path / "fourth") == first


def test_copies_during_training(fid, tmp_path, capsys, monkeypatch):
    """A curve, by the definition; then with a nearness that four of ten samples have."""
    from diffusion.data.batches import open_batches
    from diffusion.evaluation import fid as module
    from diffusion.evaluation.copies import nearness
    from diffusion.pictures.grid import to_uint8
    from diffusion.sampling.load import load

    known = []
    monkeypatch.setattr(module, "nearness", lambda train: known.append(nearness(train)) or known[0])
    train(Config(**fid | dict(fid_copies=True)))
    lines = [line for line in run_lines(tmp_path / "run") if "pooled" in line]
    assert [line["step"] for line in lines] == [6, 12] and "% copies" in capsys.readouterr().out

    # against the definition: these samples, the training images and their mirror images
    pipeline, data = load(tmp_path / "run" / "model.pt"), open_batches(Config(**fid))
    features = open_features(fid["fid_features"], CPU)
    order = permutation(118, 0, "fid")
    labels = torch.tensor([data.labels[data.train[order[i]]] for i in range(10)])
    fake = features(to_uint8(pipeline.sample(range(10), sampler="dpmpp_2m", steps=20, labels=labels, amp="no")))  # fmt: skip
    images = data.pixels[data.train]
    a, b = features(images), features(images[:, :, ::-1].copy())
    between = torch.minimum(torch.cdist(a, a), torch.cdist(a, b))
    near = between.fill_diagonal_(math.inf).amin(1).quantile(0.01)
    assert_close(known[0], near)
    distances = torch.cdist(fake, torch.cat([a, b])).amin(1)
    assert lines[-1]["copies"] == pytest.approx(float((distances < near).double().mean()))

    middle = distances.sort().values[3:5].mean()
    monkeypatch.setattr(module, "nearness", lambda train: middle)
    train(Config(**fid | dict(fid_copies=True, save_folder=str(tmp_path / "middle"))))
    [*_, last] = [line for line in run_lines(tmp_path / "middle") if "pooled" in line]
    assert last["copies"] == pytest.approx(0.4)


def without(fid: dict) -> dict:
    """Leave out all that measures."""
    return {name: value for name, value in fid.items() if not name.startswith("fid")}


def test_fid_leaves_the_run_as_it_is(fid, tmp_path):
    train(Config(**fid))
    train(Config(**without(fid) | dict(save_folder=str(tmp_path / "plain"))))
    mine = [line for line in run_lines(tmp_path / "run") if "pooled" not in line]
    assert mine == run_lines(tmp_path / "plain")


@pytest.mark.slow
def test_the_reference_is_of_its_data_size_and_network(fid, tmp_path, pooled):
    train(Config(**fid | dict(train_steps=6)))
    other = tmp_path / "other.pt"
    other.write_bytes(pooled.read_bytes())
    for i, change in enumerate([dict(image_size=12), dict(fid_features=str(other)), dict(seed=1)]):
        train(Config(**fid | dict(train_steps=6, save_folder=str(tmp_path / str(i))) | change))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3  # another seed needs no other
    # other data: another folder, and the same one with a file changed in place
    folder = pictures(tmp_path / "folder", range(20))
    for name in "ab":
        options = dict(data=str(folder), condition="none", train_steps=6, save_folder=str(tmp_path / name))  # fmt: skip
        train(Config(**fid | options))
        Image.fromarray(toy.draw(99, 17)).save(folder / "003.png")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 5


@pytest.mark.slow
def test_two_ranks_give_the_fid_of_one(fid, tmp_path):
    train(Config(**fid | dict(dropout=0.0)))
    options = fid | dict(dropout=0.0, save_folder=str(tmp_path / "two"), cache_dir=str(tmp_path / "own"))  # fmt: skip
    done = warm.script("train.py", *flags(options), cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = values_of(tmp_path / "run"), values_of(tmp_path / "two")
    assert sorted(two) == [6, 12]
    assert_close(list(two.values()), list(one.values()), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_stopped_while_it_measures(fid, tmp_path):
    """The run saves and stops; continued, it measures what is missing, also at the last step."""
    slow = fid | dict(fid_num_images=1_000_000)
    run = warm.Process("train.py", *flags(slow), cwd=tmp_path)
    while not (tmp_path / "run" / "checkpoints" / "step_00000004.pt").exists():
        time.sleep(0.05)
        assert run.poll() is None
    time.sleep(2)  # steps 5 and 6 take milliseconds
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "step 6" in out
    assert values_of(tmp_path / "run") == {}
    assert warm.script("train.py", *flags(fid), cwd=tmp_path).returncode == 0
    straight = flags(fid | dict(save_folder=str(tmp_path / "straight")))
    assert warm.script("train.py", *straight, cwd=tmp_path).returncode == 0
    assert run_lines(tmp_path / "run") == run_lines(tmp_path / "straight")
    # cut away the last value: a finished run still lacks it
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    assert warm.script("train.py", *flags(fid), cwd=tmp_path).returncode == 0
    assert run_lines(tmp_path / "run") == run_lines(tmp_path / "straight")


def test_a_missing_network_is_told_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "http://127.0.0.1:9/none.pt")
    with pytest.raises(UserError, match="put it at"):
        train(Config(**tiny | dict(fid=True)))
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match="--fid_features.*--fid"):
        resolve_config(Config(fid_features="a.pt"))
    with pytest.raises(UserError, match="not --streaming"):
        Fid(Config(data="hf:a/b", streaming=True, fid=True), None, CPU)


def test_too_little_for_a_distance_is_told_at_once(fid, tmp_path):
    folder = pictures(tmp_path / "one", [1])
    with pytest.raises(UserError, match="there is only 1"):
        train(Config(**fid | dict(data=str(folder), condition="none")))

    class Broken(Pooled):
        def forward(self, x):
            return x.float().mean((2, 3)) / 0.0 - x.float().mean((2, 3)) / 0.0

    torch.jit.script(Broken()).save(str(tmp_path / "broken.pt"))
    with pytest.raises(UserError, match="non-finite"):
        train(Config(**fid | dict(fid_features=str(tmp_path / "broken.pt"))))


def test_a_shorter_train_steps_measures_the_end(fid, tmp_path):
    """Of a run that is longer already."""
    train(Config(**without(fid) | dict(train_steps=10)))
    train(Config(**fid | dict(train_steps=8)))
    assert sorted(values_of(tmp_path / "run")) == [10]


def test_scores_do_not_depend_on_the_order_of_files():
    sure = torch.eye(8).double().repeat_interleave(20, 0)
    assert inception_score(sure, 5)[0] > 5


def test_values_come_in_the_order_of_the_images():
    image = lambda value: np.full((1, 1, 3), value, np.uint8)  # noqa: E731
    batches = [(numbers, {}, np.stack([image(n) for n in numbers])) for numbers in ([1, 3], [0, 2])]  # fmt: skip

    def compute(numbers, given, images) -> dict:
        means = torch.from_numpy(images).double().mean((1, 2, 3))
        return {"mean": means, "first": means[: sum(n < 2 for n in numbers)]}

    found = collect(batches, compute, "x")
    assert found["mean"].tolist() == [0, 1, 2, 3] and found["first"].tolist() == [0, 1]
    with pytest.raises(UserError, match="no images of x"):
        collect([], compute, "x")
    other = ([4], {}, np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="x differ in size.*--size"):
        collect(
            [*batches, other], lambda n, given, images: {"image": torch.from_numpy(images)}, "x"
        )


def test_features_are_float64_on_the_cpu():
    features = Features("x", "x", "x", Pooled(), CPU)
    out = features(np.zeros((2, 8, 8, 3), np.uint8))
    assert out.dtype == torch.float64 and out.device == CPU
