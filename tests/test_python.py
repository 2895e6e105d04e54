"""What a notebook calls: diffusion.load, sample and train; the model that comes with the package."""

import copy
import inspect
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from helpers import tiny_run
from PIL import Image
from torch.testing import assert_close

import diffusion
from diffusion import UserError
from diffusion.config import Config, config_from_args
from diffusion.files.checkpoint import load_weights
from diffusion.sampling.image_tensor import Images, NonFinite
from diffusion.sampling.load import SHIPPED, load, open_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ours(model):
    return diffusion.load(model)


# --- how many, which, of what ---------------------------------------------------------------------


def test_a_number_prompts_and_indices(ours, scratch):
    few = ours.sample(5, steps=3, seed=2)
    assert few.shape == (5, 3, 16, 16) and few.dtype == torch.float32
    assert_close(ours.sample([3], steps=3, seed=2), few[3:4], rtol=0, atol=1e-5)
    assert ours.sample(steps=1).shape[0] == 1
    told = diffusion.load(scratch)
    pair = told.sample(["a face", "a hat"], steps=2)
    assert_close(told.sample("a face", steps=2), pair[:1], rtol=0, atol=1e-4)
    # as the lower layer does it, where a prompt leads: at 7.5
    options = told.prompted(["a face", "a hat"])(range(2))
    table = told.table(None, 2)
    assert_close(pair, told.sample_batch(range(2), table=table, guidance_scale=7.5, **options))
    plain = told.sample_batch(range(2), table=table, **options)
    assert_close(told.sample(["a face", "a hat"], steps=2, guidance_scale=1.0), plain)
    assert not torch.allclose(plain, pair, atol=1e-2)


def test_numbers_and_lists_of_any_kind(ours):
    expected = ours.sample([0, 1], steps=2)
    for what in (np.int64(2), range(2), (0, 1), np.arange(2), iter([0, 1])):
        assert_close(ours.sample(what, steps=2), expected)


@pytest.mark.parametrize("options, named", [
    (dict(what=0), "number of images is 0"), (dict(what=-1), "is -1"), (dict(what=[]), "number of images is 0"),
    (dict(what=2, batch_size=0), "batch_size"), (dict(what=1, strength=0.3), "init_image"),
    (dict(what=1, negative_prompt="grey"), "negative_prompt"), (dict(what="a face"), "no text"),
])  # fmt: skip
def test_what_would_do_nothing(ours, options, named):
    with pytest.raises(UserError, match=named):
        ours.sample(**options)


def test_batches_change_nothing(ours):
    labels = torch.tensor([0, 1, 2, 0, 1])
    at_once = ours.sample(5, steps=3, labels=labels, guidance_scale=2.0)
    in_turn = ours.sample(5, steps=3, labels=labels, guidance_scale=2.0, batch_size=2)
    assert_close(in_turn, at_once, rtol=0, atol=1e-5)
    named = ours.sample(5, steps=3, class_label="all", guidance_scale=2.0, batch_size=3)
    assert_close(named, at_once, rtol=0, atol=1e-5)
    assert not torch.allclose(ours.sample(5, steps=3, class_label="1"), at_once, atol=1e-2)
    with pytest.raises(UserError, match="horse"):
        ours.sample(1, class_label="horse")


def test_a_long_call_shows_its_progress(ours, capfd, monkeypatch):
    from diffusion.sampling import pipeline

    shown = []
    real = pipeline.progress
    monkeypatch.setattr(
        pipeline, "progress", lambda **o: shown.append(o) or real(**o | {"delay": 0})
    )
    ours.sample(5, steps=4, batch_size=2)
    assert shown[0]["total"] == 20 and shown[0]["unit"] == "step"
    assert "/20" in capfd.readouterr().err


# --- what comes back ------------------------------------------------------------------------------


def test_images_are_a_tensor_and_pictures(ours, tmp_path):
    images = ours.sample(3, steps=2)
    assert type(images) is Images and type(images * 1) is torch.Tensor is type(images[0])
    pictures = images.pil()
    assert [p.size for p in pictures] == [(16, 16)] * 3 and pictures[0].mode == "RGB"
    expected = ((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.stack(list(map(np.asarray, pictures))), expected)
    assert images.grid(3).size == (3 * 18 + 2, 20)
    shown = Image.open(io.BytesIO(images._repr_png_()))
    assert shown.size == images.grid().size
    # files and copies of it are those of a tensor
    torch.save(images, tmp_path / "images.pt")
    assert_close(torch.load(tmp_path / "images.pt", weights_only=True), torch.Tensor(images))
    assert_close(copy.deepcopy(images), images)
    with pytest.raises(NonFinite):
        torch.full((1, 3, 2, 2), torch.nan).as_subclass(Images).pil()


# --- from an image --------------------------------------------------------------------------------


def test_from_a_picture_and_with_a_mask(ours, tmp_path):
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    red.save(tmp_path / "red.png")
    near = ours.sample(2, init_image=tmp_path / "red.png", strength=0.3, steps=10)
    assert near.shape == (2, 3, 16, 16)
    assert_close(ours.sample(2, init_image=red, strength=0.3, steps=10), near)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    kept = ours.sample(2, init_image=red, mask=mask, steps=10)
    target = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    assert_close(torch.Tensor(kept)[..., 8:], target.expand(2, 3, 16, 8), rtol=0, atol=1e-5)
    assert not torch.allclose(kept[..., :8], target, atol=0.1)
    # a photo on its side stands up, as it does from a file
    photo = Image.new("RGB", (16, 32), (0, 0, 255))
    photo.paste((255, 255, 255), (0, 0, 16, 8))
    exif = photo.getexif()
    exif[0x0112] = 3
    photo.save(tmp_path / "side.jpg", exif=exif)
    file = ours.sample(1, init_image=tmp_path / "side.jpg", strength=0.1, steps=10)
    opened = ours.sample(1, init_image=Image.open(tmp_path / "side.jpg"), strength=0.1, steps=10)
    assert_close(opened, file)
    # as a tensor, and of modes that a PNG has not
    white = torch.zeros(2, 1, 16, 16)
    white[..., :8] = 1
    assert_close(ours.sample(2, init_image=red, mask=white, steps=10), kept)
    for mode in ("CMYK", "YCbCr", "RGBa", "HSV"):
        of = ours.sample(2, init_image=red.convert(mode), strength=0.3, steps=10)
        assert_close(of, near, rtol=0, atol=0.05)
    with pytest.raises(UserError, match="init_image"):
        ours.sample(1, mask=mask)
    with pytest.raises(UserError, match="missing.png"):
        ours.sample(1, init_image=tmp_path / "missing.png")


# --- loading --------------------------------------------------------------------------------------


def test_lora_by_keyword(model, tiny, tmp_path):
    folder = diffusion.train(
        data=tiny["data"], image_size=16, load_path=model, adapter="lora", train_steps=4, save_and_sample_every=4,
        num_samples=0, learning_rate=0.05, targets="attention", batch_size=8, device="cpu", amp="no",
        cache_dir=tiny["cache_dir"], save_folder=tmp_path / "lora",
    )  # fmt: skip
    file = folder / "adapter.safetensors"
    theirs = open_pipeline(str(model), None, None, CPU, loras=[(file, 0.5)])
    expected = theirs.sample(2, steps=2)
    for lora in ((file, 0.5), [(str(file), 0.5)]):
        assert_close(diffusion.load(model, lora=lora).sample(2, steps=2), expected)
    whole = diffusion.load(model, lora=file).sample(2, steps=2)
    assert_close(diffusion.load(model, lora=[file]).sample(2, steps=2), whole)
    assert not torch.allclose(whole, expected, atol=1e-3)


def test_load_takes_what_sample_py_takes(model, sd_folder):
    """Every option of `open_pipeline` and `Options` is a keyword; paths may be Path or text."""
    assert diffusion.load(Path(model), guide=model).guide is not None
    pair = diffusion.load(Path(sd_folder), height=64, width=48, clip_skip=2, amp="no", device="cpu")
    assert (pair.height, pair.width, pair.clip_skip) == (64, 48, 2)
    assert pair.sample(["a fox"], steps=1, guidance_scale=7.5).shape == (1, 3, 64, 48)
    # an init image brings its own size for its own call
    photo = Image.new("RGB", (96, 32), (255, 0, 0))
    sd = diffusion.load(sd_folder, amp="no")
    own = (sd.height, sd.width)
    wide = sd.sample("a fox", steps=2, init_image=photo).shape
    assert wide[3] > 2 * wide[2] and (sd.height, sd.width) == own
    with pytest.raises(ValueError):
        sd.sample("a fox", steps=2, init_image=photo, eta=9)
    assert (sd.height, sd.width) == own  # also of one that fails
    assert pair.sample("a fox", steps=2, init_image=photo).shape == (1, 3, 64, 48)
    assert diffusion.load(sd_path=sd_folder, amp="no").config.sd_path == sd_folder
    # of the folder of its own run, too, the guide is the raw weights
    guide = diffusion.load(model.parent, guide=model.parent).guide
    raw = load_weights(model, "raw")[0]
    assert all(torch.equal(v, raw[name]) for name, v in guide.model.state_dict().items())
    with pytest.raises(UserError, match="nowhere"):
        diffusion.load("nowhere/model.pt")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="CUDA"):
            diffusion.load(model, device="cuda")


def test_the_face_is_typed_and_documented():
    from diffusion.sampling.pipeline import Pipeline

    for function in (diffusion.load, diffusion.train, Pipeline.sample, Images.pil, Images.grid):
        assert inspect.getdoc(function)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert set(untyped) <= {"self", "options"}, function


# --- training -------------------------------------------------------------------------------------


def test_training_is_train_py(faces, tmp_path):
    own = tiny_run(faces, tmp_path)
    config = Config(**own)
    folder = diffusion.train(**own | {"data": Path(own["data"])}, preset="none")
    assert folder == Path(config.save_folder)
    assert json.loads((folder / "metadata.json").read_text())["step"] == config.train_steps
    assert diffusion.load(folder).sample(2, steps=2).isfinite().all()
    before = load_weights(folder / "model.pt", "raw")[0]
    diffusion.train(**own | {"train_steps": config.train_steps + 2}, preset="none")  # resumes
    assert json.loads((folder / "metadata.json").read_text())["step"] == config.train_steps + 2
    after = load_weights(folder / "model.pt", "raw")[0]
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options, named", [
    (dict(lr=1), "learning_rate"), (dict(output_dir=1), "save_folder"), (dict(nonsense=1), "nonsense"),
    (dict(image_size="96x128"), "image_size"), (dict(data=""), "data"), (dict(train_steps="5"), "train_steps"),
    (dict(save_folder=Path("x"), preset="nonsense"), "nonsense"),
])  # fmt: skip
def test_mistakes_in_the_options_of_training(options, named):
    with pytest.raises(UserError, match=named):
        diffusion.train(**options)
    assert not list(Path().iterdir())


def test_training_in_a_thread(faces, tmp_path):
    """Signals are the main thread's: others train without them."""
    found = []
    own = tiny_run(faces, tmp_path) | {"train_steps": 2, "save_and_sample_every": 2}
    thread = threading.Thread(target=lambda: found.append(diffusion.train(**own, preset="none")))
    thread.start()
    thread.join()
    assert (found[0] / "model.pt").is_file()


# --- the model that comes with the package --------------------------------------------------------


def test_the_shipped_model_is_the_default_run():
    weights, config, metadata = load_weights(SHIPPED)
    assert SHIPPED.stat().st_size <= 4e6
    assert {w.dtype for w in weights.values()} == {torch.float16}
    default = config_from_args({})
    assert config.differences(default) == {} and metadata["step"] == default.train_steps
    text = SHIPPED.read_bytes()[:20_000].decode("latin-1")
    assert "/home" not in text and "/work" not in text and "/tmp" not in text


def test_it_is_used_only_where_nothing_was_named(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = diffusion.load()
    assert "comes with the program" in capsys.readouterr().out
    assert_close(shipped.sample(1, steps=2), load(SHIPPED).sample(1, steps=2))
    with pytest.raises(UserError, match="results/model.pt"):
        diffusion.load("results/model.pt")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "model.pt").write_bytes(Path(model).read_bytes())
    assert diffusion.load().config.image_size == 16
    assert "comes with" not in capsys.readouterr().out


def test_sample_py_draws_at_once(tmp_path):
    done = script("sample.py", "--num_images", 4, "--steps", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = Image.open(tmp_path / "results" / "images" / "000003.png").text["parameters"]
    assert "Model: toy_faces" in text
    assert done.stdout.splitlines()[-1] == "next: python visualize.py --html"
    done = script("sample.py", "--load_path", "results/model.pt", cwd=tmp_path)
    assert done.returncode == 1 and "results/model.pt" in done.stderr


def test_it_draws_faces():
    """Its pictures have what faces have: a flat background, and colours as in the data."""
    from diffusion.data import toy

    images = load(SHIPPED).sample(32, steps=10)
    real = torch.from_numpy(np.stack([toy.draw(i, 32) for i in range(1000, 1256)]))
    real = real.permute(0, 3, 1, 2) / 127.5 - 1
    assert_close(torch.Tensor(images).mean((0, 2, 3)), real.mean((0, 2, 3)), rtol=0, atol=0.3)
    assert_close(torch.Tensor(images).std((0, 2, 3)), real.std((0, 2, 3)), rtol=0, atol=0.15)
    corner = images[..., :3, :3].std((2, 3)).mean(), real[..., :3, :3].std((2, 3)).mean()
    assert corner[0] < corner[1] + 0.05


def test_the_file_is_made_by_its_benchmark(model, tmp_path):
    import subprocess
    import sys

    target = tmp_path / "half.safetensors"
    source = Path(model).with_name("ema.safetensors")
    command = [sys.executable, str(ROOT / "benchmarks" / "shipped.py"), str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    full, config, _ = load_weights(source)
    half, other, _ = load_weights(target)
    assert other.save_folder == "results" and config.differences(other) == {}
    for name, value in full.items():
        assert_close(half[name], value.half())


# --- bars where there is no terminal --------------------------------------------------------------

BARS = """
from diffusion.runtime.distributed import progress
with progress(total=3, unit="step") as outer:
    for i in range(3):
        for j in progress(range(4), desc="fid", leave=False, mininterval=0):
            pass
        outer.update()
"""


def test_a_log_gets_lines():
    import subprocess
    import sys

    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout == ""
    assert not set("\r\x1b") & set(done.stderr)
    lines = done.stderr.splitlines()
    assert all(line.strip() and "/" in line for line in lines) and lines[-1].startswith("100% 3/3")
    assert any(line.startswith("fid") for line in lines)
