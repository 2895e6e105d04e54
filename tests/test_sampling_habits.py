"""Sampling and looking: nothing is written over, what cannot be a picture is none, options do
something, masks and images go together, classes go by name, PNG texts say what ran."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import UserError
from diffusion.config import Config, config_from_args
from diffusion.data import toy
from diffusion.files import adapter_files as adapters
from diffusion.files import owned
from diffusion.models import lora
from diffusion.pictures.grid import count_calls, parameters_text, read_parameters
from diffusion.sampling.load import load, open_pipeline
from diffusion.sampling.pipeline import Pipeline
from diffusion.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def call(monkeypatch):
    """A script's main in this process."""
    from diffusion.commands import sample, visualize

    def main(script, *args):
        module = {"sample": sample, "visualize": visualize}[script]
        monkeypatch.setattr("sys.argv", [script, *map(str, args), "--device", "cpu", "--amp", "no"])
        module.main()

    return main


def plain(model, folder) -> list:
    return ["--load_path", model, "--save_folder", folder, "--steps", 2]


def contents(folder) -> dict[str, bytes]:
    """{name: bytes} of the files that one sees."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.is_file() and f.name[0] != "."}  # fmt: skip


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def text_of(path) -> dict[str, str]:
    """What stands behind the last newline of `parameters`, as {name: value}."""
    line = Image.open(path).text["parameters"].rsplit("\n", 1)[-1]
    return dict(part.split(": ", 1) for part in line.split(", "))


@pytest.fixture
def lora_files(model, tmp_path):
    """Two LoRAs of the pixel model."""
    files = []
    for name, value in (("a", 0.0), ("b", 0.1)):
        parts = {"unet": load(model).model}
        lora.inject(parts["unet"], lora.find(parts["unet"], "attention"), 1, 1.0)
        states = lora.state(parts["unet"])
        for branch in states.values():
            branch.up.fill_(value)
        files.append(tmp_path / f"{name}.safetensors")
        adapters.write_diffusers(files[-1], {"unet": states})
    return files


def test_hidden_files_of_others_stay(model, tmp_path, call):
    (tmp_path / "images").mkdir()
    others = [
        tmp_path / name for name in ("images/.foo.tmp", ".images_old_1", "images/.000000.png.x.tmp")
    ]
    for file in others:
        file.write_text("mine")
    (tmp_path / ".images_1_2").mkdir()
    call("sample", *plain(model, tmp_path), "--num_images", 2)
    assert [file.read_text() for file in others] == ["mine"] * 3
    assert len(contents(tmp_path / "images")) == 2


# --- nothing is written over ---------------------------------------------------------------------


def test_a_second_call_continues_the_numbers(model, tmp_path):
    out = tmp_path / "results"
    args = ("--load_path", model, "--steps", 2, "--device", "cpu", "--amp", "no", "--num_images", 3)
    first = warm.script("sample.py", *args, cwd=tmp_path)  # into the default folder
    assert first.returncode == 0, first.stderr
    before = contents(out / "images") | contents(out)
    second = warm.script("sample.py", *args, "--seed", 1, "--batch_size", 1, cwd=tmp_path, ranks=2)
    assert second.returncode == 0, second.stderr
    after = contents(out / "images") | contents(out)
    assert {name: after[name] for name in before} == before
    new = {"000003.png", "000004.png", "000005.png", "grid_2.png"}
    assert set(after) == set(before) | new
    assert "3 pictures from before" in second.stdout and "numbered from 3" in second.stdout
    # picture i of the seed, whatever its number
    alone = warm.script("sample.py", *args, "--seed", 1, "--save_folder", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    for i in range(3):
        a, b = out / "images" / f"{i + 3:06d}.png", tmp_path / "alone" / "images" / f"{i:06d}.png"
        assert abs(pixels(a) - pixels(b)).max() <= 2
        assert text_of(a)["Image"] == str(i) == text_of(b)["Image"]


def test_overwrite_replaces_what_is_ours_only(model, tmp_path, call, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(toy.draw(0, 16)).save(images / "000001.png")  # somebody's
    (images / "notes.txt").write_text("mine")
    Image.fromarray(toy.draw(1, 16)).save(tmp_path / "grid.png")
    theirs = contents(images) | contents(tmp_path)
    call("sample", *plain(model, tmp_path), "--num_images", 5)
    assert {f"{n:06d}.png" for n in range(2, 7)} < set(contents(images))
    assert owned.is_our_picture(tmp_path / "grid_2.png")
    call("sample", *plain(model, tmp_path), "--num_images", 2, "--seed", 1, "--overwrite")
    found = contents(images) | contents(tmp_path)
    assert {name: found[name] for name in theirs} == theirs
    assert set(contents(images)) == {"000001.png", "notes.txt", "000002.png", "000003.png"}
    assert text_of(images / "000002.png")["Seed"] == "1"
    assert "3 other pictures of earlier calls are deleted" in capsys.readouterr().out


def test_without_foreign_files_overwrite_begins_at_zero(model, tmp_path, call):
    call("sample", *plain(model, tmp_path), "--num_images", 3)
    call("sample", *plain(model, tmp_path), "--num_images", 3)
    old = contents(tmp_path)
    with pytest.raises(UserError, match="class_label"):  # what fails deletes nothing
        call("sample", *plain(model, tmp_path), "--class_label", "cat", "--overwrite")
    assert len(contents(tmp_path / "images")) == 6 and contents(tmp_path) == old
    call("sample", *plain(model, tmp_path), "--num_images", 2, "--seed", 7, "--overwrite")
    assert set(contents(tmp_path / "images")) == {"000000.png", "000001.png"}
    assert contents(tmp_path)["grid.png"] != old["grid.png"]
    assert set(contents(tmp_path)) == {"grid.png"}  # a sheet of deleted pictures goes with them


def test_two_at_once_lose_no_picture(model, tmp_path):
    def start(seed):
        return warm.Process("sample.py", *plain(model, tmp_path / "out"), "--num_images", 12, "--batch_size", 2,
                            "--seed", seed, "--device", "cpu", "--amp", "no", cwd=tmp_path)  # fmt: skip

    both = [start(1), start(2)]
    assert [p.wait() for p in both] == [0, 0], [p.read() for p in both]
    images = tmp_path / "out" / "images"
    assert set(contents(images)) == {f"{i:06d}.png" for i in range(24)}
    seen = [(text_of(f)["Seed"], int(text_of(f)["Image"])) for f in sorted(images.glob("*.png"))]
    assert sorted(seen) == [(seed, i) for seed in "12" for i in range(12)]
    assert {"grid.png", "grid_2.png"} == set(contents(tmp_path / "out"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_call_leaves_whole_pictures(model, tmp_path, number):
    args = [*plain(model, tmp_path), "--batch_size", 1, "--device", "cpu", "--amp", "no"]
    process = warm.Process("sample.py", *args, "--num_images", 5000, cwd=tmp_path)
    images = tmp_path / "images"
    end = time.monotonic() + 60
    while len(list(images.glob("[0-9]*.png"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() != 0
    count = len(contents(images))
    assert 3 <= count < 5000
    assert set(contents(images)) == {f"{i:06d}.png" for i in range(count)}
    for name in contents(images):
        Image.open(images / name).load()
    done = warm.script("sample.py", *args, "--num_images", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{count:06d}.png" in contents(images) and len(list(images.iterdir())) == count + 1


@pytest.mark.slow
def test_visualize_leaves_what_is_there(model, tmp_path, call, capsys):
    args = [*plain(model, tmp_path), "--num_images", 1, "--html"]
    call("visualize", *args)
    before = contents(tmp_path / "viz")
    capsys.readouterr()
    call("visualize", *args, "--seed", 3)
    assert contents(tmp_path / "viz") == before
    assert set(contents(tmp_path / "viz_2")) == set(before)
    assert "viz_2" in capsys.readouterr().out
    # --overwrite: what is ours is replaced; without a page and the curves of a run it is less
    call("visualize", "--save_folder", tmp_path, "--num_images", 1, "--data", "toy", "--overwrite")
    after = contents(tmp_path / "viz")
    assert set(before) - set(after) == {"index.html", "curves.png"} and set(after) < set(before)
    # and a folder in which there is somebody's file stays as it is
    (tmp_path / "viz" / "backward.webp").write_bytes(b"mine")
    after = contents(tmp_path / "viz")
    call("visualize", *args, "--overwrite")
    assert contents(tmp_path / "viz") == after and "index.html" in contents(tmp_path / "viz_2")


def low_rank(path, model, value: float, seed: int):
    """A LoRA of every layer of a pixel model."""
    network = load(model).model
    torch.manual_seed(seed)
    lora.inject(network, lora.find(network, "all"), 1)
    parts = {"unet": lora.state(network)}
    for branch in parts["unet"].values():
        for weights in (branch.down, branch.up):
            weights.copy_(value * torch.randn_like(weights))
    adapters.write_diffusers(path, parts)
    return path


def test_interpolations_are_numbered(model, tmp_path, call):
    a, b = (low_rank(tmp_path / f"{n}.safetensors", model, 0.05, n) for n in (1, 2))
    args = [*plain(model, tmp_path), "--lora_interpolate", a, b, "--points", 2, "--num_images", 1]
    call("sample", *args)
    before = (tmp_path / "interpolation.png").read_bytes()
    call("sample", *args, "--seed", 5)
    assert (tmp_path / "interpolation.png").read_bytes() == before
    assert (tmp_path / "interpolation_2.png").read_bytes() != before
    call("sample", *args, "--seed", 5, "--overwrite")
    assert pixels(tmp_path / "interpolation.png").tolist() == pixels(tmp_path / "interpolation_2.png").tolist()  # fmt: skip


def test_what_is_written_is_known_as_ours(model, tmp_path, call):
    call("sample", *plain(model, tmp_path), "--num_images", 1)
    call("visualize", *plain(model, tmp_path), "--num_images", 1)
    assert owned.is_ours(tmp_path / "images") and owned.is_ours(tmp_path / "viz")
    assert not owned.is_ours(tmp_path)
    for file in ("images/000000.png", "grid.png", "viz/forward.png", "viz/forward.webp"):
        assert owned.is_our_picture(tmp_path / file), file
    Image.fromarray(toy.draw(0, 16)).save(tmp_path / "other.webp")
    assert not owned.is_our_picture(tmp_path / "other.webp")
    # a folder of somebody's pictures does not become ours
    (tmp_path / "b" / "images").mkdir(parents=True)
    Image.fromarray(toy.draw(0, 16)).save(tmp_path / "b" / "images" / "mine.png")
    call("sample", *plain(model, tmp_path / "b"), "--num_images", 1)
    assert not owned.is_ours(tmp_path / "b" / "images")


def test_pictures_of_several_calls_are_counted(model, tmp_path, call):
    images = tmp_path / "images"
    call("sample", *plain(model, tmp_path), "--num_images", 3, "--class_label", "all")
    assert count_calls(sorted(images.iterdir())) == 1
    call("sample", *plain(model, tmp_path), "--num_images", 2, "--class_label", "all")
    assert count_calls(sorted(images.iterdir())) == 2
    call("sample", *plain(model, tmp_path), "--num_images", 2, "--seed", 1)
    assert count_calls(sorted(images.iterdir())) == 3


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_of_files_and_with_a_sign(tmp_path):
    from diffusion.commands import sample

    file = tmp_path / "prompts.txt"
    for raw in (b"\xef\xbb\xbfa red fox\r\n\r\ntwo cats\r\n", b"a red fox\ntwo cats",
                "\ufeffa red fox\ntwo cats\n".encode("utf-16-le")):  # fmt: skip
        file.write_bytes(raw)
        assert sample.parse(["--prompt", f"@{file}"]).prompt == ["a red fox", "two cats"]
    assert sample.parse(["--prompt", "@@home", "--prompt", "a @ b"]).prompt == ["@home", "a @ b"]
    with pytest.raises(UserError, match=r"missing\.txt.*@@missing\.txt"):
        sample.parse(["--prompt", "@missing.txt"])
    file.write_text("\n \n")
    with pytest.raises(UserError, match="no prompt"):
        sample.parse(["--prompt", f"@{file}"])


# --- from an image -------------------------------------------------------------------------------


def photo(path, width, height):
    Image.fromarray(toy.draw(3, 64)).resize((width, height)).save(path)
    return path


@pytest.mark.parametrize("size, given, expected", [
    ((64, 64), (), (32, 32)), ((96, 48), (), (46, 22)), ((30, 120), (), (16, 64)),
    ((96, 48), ("--height", 32), (64, 32)), ((96, 48), ("--width", 20), (20, 10)),
    ((96, 48), ("--height", 32, "--width", 16), (16, 32)),
])  # fmt: skip
def test_an_image_takes_its_own_aspect(sd_folder, tmp_path, call, size, given, expected):
    """About 32 x 32 pixels, the model's own number, sides multiples of the VAE's 2."""
    image = photo(tmp_path / "photo.png", *size)
    call("sample", "--sd_path", sd_folder, "--prompt", "x", "--num_images", 1, "--steps", 2,
         "--init_image", image, "--save_folder", tmp_path / "s", *given)  # fmt: skip
    assert Image.open(tmp_path / "s" / "images" / "000000.png").size == expected


def test_a_mask_goes_with_its_image(model, tmp_path, call, capsys):
    """In a pixel model: black and transparent stay, white on a transparent layer is new."""
    image = photo(tmp_path / "photo.png", 48, 32)
    strokes = np.zeros((32, 48, 4), np.uint8)
    strokes[:, 24:] = 255  # white on a transparent layer
    Image.fromarray(strokes).save(tmp_path / "layer.png")
    call("sample", *plain(model, tmp_path / "s"), "--num_images", 1, "--init_image", image,
         "--mask", tmp_path / "layer.png", "--strength", 1)  # fmt: skip
    assert "cut to 32x32" in capsys.readouterr().out  # the square in the middle
    middle = Image.open(image).crop((8, 0, 40, 32)).resize((16, 16), Image.LANCZOS)
    difference = abs(pixels(tmp_path / "s" / "images" / "000000.png") - np.asarray(middle).astype(int))  # fmt: skip
    assert difference[:, 3:7].max() <= 2 and difference[:, 9:].mean() > 10
    # as large, or of its aspect: half the size is the same mask
    Image.fromarray(strokes[::2, ::2]).save(tmp_path / "half.png")
    call("sample", *plain(model, tmp_path / "h"), "--num_images", 1, "--init_image", image,
         "--mask", tmp_path / "half.png", "--strength", 1)  # fmt: skip
    a, b = (pixels(tmp_path / n / "images" / "000000.png") for n in "sh")
    assert abs(a - b)[:, [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]].max() <= 2
    for size in ((32, 32), (48, 48), (32, 48)):
        Image.new("L", size, 255).save(tmp_path / "other.png")
        with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.*48x32"):
            call("sample", *plain(model, tmp_path / "t"), "--init_image", image,
                 "--mask", tmp_path / "other.png")  # fmt: skip
    Image.new("L", (48, 32), 0).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="repaints nothing"):
        call("sample", *plain(model, tmp_path / "t"), "--init_image", image,
             "--mask", tmp_path / "black.png")  # fmt: skip


def test_inpainting_at_strength_1_starts_from_noise(model):
    """What is to be repainted depends on the image no more, where it is repainted whole."""
    pipeline = load(model)
    options = dict(steps=4, amp="no", spacing="leading", strength=1.0, mask=torch.ones(1, 1, 16, 16))  # fmt: skip
    black, white = (pipeline.sample([0], init=torch.full((1, 3, 16, 16), v), **options) for v in (-1.0, 1.0))  # fmt: skip
    assert torch.equal(black, white)
    options["strength"] = 0.75
    black, white = (pipeline.sample([0], init=torch.full((1, 3, 16, 16), v), **options) for v in (-1.0, 1.0))  # fmt: skip
    assert not torch.allclose(black, white, atol=0.1)


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, choice, label", [
    (["1", "10", "9"], "9", 2), (["1", "10", "9"], "1", 0), (["1", "10", "9"], "2", None),
    (["1", "10", "9"], "0", None), (["cat", "7"], "0", None), (["cat", "dog"], "1", 1),
    (["cat", "dog"], "2", None), (["cat", "dog"], "-1", None), (["cat", "dog"], "\u00b2", None),
    (["all", "cat"], "all", 0), (["0", "all"], "all", 1), (["cat", "007"], "7", None),
])  # fmt: skip
def test_names_of_classes_come_before_numbers(model, classes, choice, label):
    pipeline = load(model)
    pipeline.conditioning = dataclasses.replace(pipeline.conditioning, classes=classes)
    if label is None:
        with pytest.raises(UserError, match=classes[0]):
            pipeline.labels(choice, range(3))
    else:
        assert pipeline.labels(choice, range(3)).tolist() == [label] * 3


def test_a_class_with_a_number_for_a_name(tmp_path, faces, call):
    """Through the commands: folders 1, 10 and 9."""
    for name, source in (("1", "bald"), ("10", "bob"), ("9", "spiky"), ("all", "bald")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in sorted((faces / source).glob("*.png"))[:4]:
            (tmp_path / "data" / name / file.name).write_bytes(file.read_bytes())
    train(Config(data=str(tmp_path / "data"), image_size=8, unet_dim=8, dim_mults=(1,), heads=1, batch_size=4,
                 condition="class", train_steps=1, num_samples=0, time_steps=10, device="cpu", amp="no",
                 save_folder=str(tmp_path / "r"), cache_dir=str(tmp_path / "c")))  # fmt: skip
    model = tmp_path / "r" / "model.pt"
    for label in ("9", "10", "all"):
        call("sample", *plain(model, tmp_path / label), "--num_images", 2, "--class_label", label)
        assert text_of(tmp_path / label / "images" / "000001.png")["Class"] == label
    for script in ("sample", "visualize"):
        with pytest.raises(UserError, match="class_label '2' is unknown.*1, 10, 9"):
            call(script, *plain(model, tmp_path / "x"), "--class_label", "2")
    # without a label all classes are shown, not the one that is called "all"
    labels = load(model).labels_in_turn(range(5)).tolist()
    assert labels == [0, 1, 2, 3, 0]


# --- pictures that are none ----------------------------------------------------------------------


def test_pictures_that_are_not_finite_are_not_saved(model, tmp_path):
    with pytest.raises(UserError, match="huge.safetensors changes .* by .*e"):
        adapters.read_lora(
            low_rank(tmp_path / "huge.safetensors", model, 1e12, 0), {"unet": load(model).model}
        )
    state = torch.load(model, weights_only=True)
    state["ema"]["out.weight"] = torch.full_like(state["ema"]["out.weight"], 3e38)
    torch.save(state, tmp_path / "model.pt")
    args = ("--device", "cpu", "--amp", "no", "--num_images", 2)
    done = warm.script(
        "sample.py", *plain(tmp_path / "model.pt", tmp_path / "s"), *args, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "2 of 2 pictures (0, 1)" in done.stderr and "LoRA weight" in done.stderr
    assert not list((tmp_path / "s").rglob("*.png"))


def test_good_batches_before_a_bad_one_stay(model, tmp_path, call, monkeypatch):
    sample_well = Pipeline.sample_batch

    def sample(self, indices, **options):
        x = sample_well(self, indices, **options)
        return x if 3 not in indices else torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.inf, x)  # fmt: skip

    monkeypatch.setattr(Pipeline, "sample_batch", sample)
    with pytest.raises(UserError, match=r"1 of 2 pictures \(3\)"):
        call("sample", *plain(model, tmp_path), "--num_images", 6, "--batch_size", 2)
    assert set(contents(tmp_path / "images")) == {"000000.png", "000001.png"}


def test_infinity_is_not_clipped_to_a_picture(model):
    """x0 is clipped to [-1, 1]: what the network overflowed to must not pass for white."""
    pipeline = load(model)
    with torch.no_grad():
        pipeline.model.out.bias.fill_(torch.inf)
    assert not pipeline.sample([0], steps=2, amp="no").isfinite().any()


def test_a_grid_that_is_not_finite_does_not_end_training(tmp_path, faces, capsys):
    own = dict(
        pixel=dict(heads=1, dim_mults=(1,), time_steps=10, sample_steps=2),
        vae=dict(dim_mults=(1, 2)),
    )
    for mode, options in own.items():
        folder = tmp_path / mode
        train(Config(data=str(faces), mode=mode, image_size=8, batch_size=4, train_steps=2, num_samples=4,
                     learning_rate=1e12, lr_warmup_steps=1, device="cpu", amp="no", grad_clip=0.0, unet_dim=8,
                     save_and_sample_every=1, save_folder=str(folder), cache_dir=str(tmp_path / "c"), **options))  # fmt: skip
        said = capsys.readouterr().out
        assert "warning: no sample grid at step 2" in said and "done:" in said
        assert not (folder / "samples" / "step_00000002.png").exists()
        assert json.loads((folder / "metadata.json").read_text())["step"] == 2


# --- options -------------------------------------------------------------------------------------

SAMPLE_BOUNDS = [
    ("seed", "-1"), ("seed", str(2**63)), ("guidance_scale", "1e30"), ("guidance_scale", "nan"),
    ("guidance_scale", "-inf"), ("eta", "nan"), ("eta", "1.5"), ("eta", "-0.1"), ("steps", "0"), ("steps", "-3"),
    ("num_images", "0"), ("batch_size", "-1"), ("width", "0"), ("height", "-8"), ("clip_skip", "0"),
    ("height", "1000000"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", SAMPLE_BOUNDS)
def test_values_out_of_range(model, tmp_path, call, name, value):
    with pytest.raises(UserError, match=f"{name} is "):
        call("sample", *plain(model, tmp_path / "s"), f"--{name}={value}")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name, value", [
    ("guidance_rescale", "5"), ("guidance_rescale", "nan"), ("guidance_rescale", "-1"),
])  # fmt: skip
def test_values_out_of_range_beside_guidance(model, tmp_path, call, name, value):
    with pytest.raises(UserError, match=f"{name} is "):
        call("sample", *plain(model, tmp_path / "s"), "--guidance_scale", 2, "--class_label", "bob",
             f"--{name}={value}")  # fmt: skip


@pytest.mark.parametrize("value", ["0", "1.01", "nan", "-1"])
def test_strength_out_of_range(model, tmp_path, call, value):
    image = photo(tmp_path / "p.png", 16, 16)
    with pytest.raises(UserError, match="strength is "):
        call("sample", *plain(model, tmp_path / "s"), "--init_image", image, "--strength", value)


@pytest.mark.parametrize("weight", ["1e30", "nan", "inf", "-1e9"])
def test_weights_of_loras_out_of_range(model, tmp_path, call, weight):
    with pytest.raises(UserError, match="f.safetensors.*weight"):
        call("sample", *plain(model, tmp_path / "s"), "--lora", f"f.safetensors:{weight}")


@pytest.mark.parametrize("args, name", [
    ("--negative_prompt a --prompt b --guidance_scale 1", "guidance_scale"),
    ("--negative_prompt a", "prompt"), ("--embedding a.pt", "prompt"),
    ("--guidance_rescale 0.5", "guidance_scale"), ("--sequential_guidance", "guidance_scale"),
    ("--mask a.png", "init_image"), ("--strength 0.5", "init_image"),
    ("--points 3", "lora_interpolate"), ("--prompt a", "no text"), ("--height 16", "height"),
    ("--width 16", "width"), ("--vae_tiling", "vae_tiling"), ("--vae x", "vae"),
    ("--clip_skip 2", "clip_skip"), ("--guidance_scale 2", "class"),
])  # fmt: skip
def test_options_without_use_in_sampling(model, tmp_path, call, args, name):
    with pytest.raises(UserError, match=name):
        call("sample", *plain(model, tmp_path / "s"), *args.split())
    assert not (tmp_path / "s").exists()


def test_options_at_their_defaults_are_no_mistake(model, tmp_path, call):
    call("sample", *plain(model, tmp_path), "--num_images", 1, "--negative_prompt", "", "--points", 5,
         "--guidance_scale", 1, "--guidance_rescale", 0, "--strength", 0.8)  # fmt: skip
    assert (tmp_path / "images" / "000000.png").is_file()


@pytest.mark.parametrize("args, name", [
    ("--seed -1", "seed is"), ("--guidance_scale nan", "guidance_scale is"), ("--steps 0", "steps is"),
    ("--num_images 17", "num_images is"), ("--prompt a", "no text"), ("--sd_path x", "sd_path"),
    ("--sampler rk45", "ddpm, ddpm_large"),
])  # fmt: skip
def test_options_of_visualize(model, tmp_path, call, args, name):
    with pytest.raises(UserError, match=name):
        call("visualize", "--load_path", model, "--save_folder", tmp_path / "s", *args.split())
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("args, name", [
    ("{folder} --num_images 5", "num_images"), ("{folder} --samplers ddim:3", "samplers"),
    ("{folder} --guidance_scale 2", "guidance_scale"), ("{folder} --vae x", "vae"), ("{model} --seeds -1", "seeds"),
    ("{model} --guidance_scale inf", "guidance_scale is"), ("{model} --batch_size 0", "batch_size is"),
])  # fmt: skip
def test_options_of_metrics(model, faces, args, name):
    from diffusion.evaluation.__main__ import parse

    with pytest.raises(UserError, match=name):
        parse([str(faces), *args.format(folder=faces, model=model).split()])


@pytest.mark.parametrize("args, name", [
    ("--steps 0", "steps is 0"), ("--learning_rate nan", "learning_rate is"), ("--seed -1", "seed is"),
    ("--vectors 0", "vectors is 0"), ("--experiments 1 --points 3", "points"), ("--experiments 1 --mix_images 3", "mix_images"),
    ("--experiments 1,4 --class_prompt x", "class_prompt"), ("--sd_config x", "sd_config"),
    ("--guidance_scale 1e30", "guidance_scale is"), ("--num_images 1", "num_images is 1"),
])  # fmt: skip
def test_options_of_the_study(args, name):
    from diffusion.study.__main__ import parse

    with pytest.raises(UserError, match=name):
        parse(["--data", "x", "--load_path", "y", *args.split()])


@pytest.mark.parametrize("wrong", [
    dict(seed=-1), dict(learning_rate=float("inf")), dict(weight_decay=float("nan")), dict(guidance_scale=-1.0),
    dict(guidance_scale=float("inf")), dict(grad_clip=float("inf")), dict(epochs=float("nan")),
])  # fmt: skip
def test_bounds_of_training_are_the_same(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is "):
        config_from_args(wrong)


def test_models_trained_before_there_were_bounds_are_read():
    stored = {"seed": -1, "guidance_scale": 2000.0, "grad_clip": float("inf")}
    assert Config.from_dict(stored).seed == -1
    with pytest.raises(UserError, match="grad_clip is nan"):
        Config.from_dict({"grad_clip": float("nan")})


@pytest.mark.parametrize("option", ["--prompt", "--negative_prompt"])
def test_prompts_in_another_encoding_are_refused(sd_folder, tmp_path, call, option):
    args = {"--prompt": "a", option: "caf\udce9"}
    with pytest.raises(UserError, match=f"{option[2:]} .*UTF-8"):
        call("sample", "--sd_path", sd_folder, "--save_folder", tmp_path, *sum(args.items(), ()))
    with pytest.raises(UserError, match="instance_prompt .*UTF-8.*LC_ALL="):
        config_from_args({"instance_prompt": "caf\udce9"})


def test_prompts_that_are_left_over_are_named(sd_folder, tmp_path, call, capsys):
    call("sample", "--sd_path", sd_folder, "--save_folder", tmp_path, "--prompt", "a", "--prompt", "b",
         "--num_images", 1, "--steps", 2)  # fmt: skip
    assert "1 of 2 prompts" in capsys.readouterr().out


# --- what is written in the picture --------------------------------------------------------------


@pytest.mark.parametrize("args, expected", [
    ("--steps 25 --spacing logsnr", {"Steps": "25", "Spacing": "logsnr", "Eta": "1.0", "Sampler": "DPM++ 2M SDE"}),
    ("--sampler dpmpp_2m_sde --steps 3", {"Steps": "3", "Spacing": "flow", "Eta": "1.0", "Sampler": "DPM++ 2M SDE"}),
    ("--sampler ddim --eta 0.5 --steps 4 --spacing leading", {"Eta": "0.5", "Spacing": "leading", "Steps": "4"}),
    ("", {"Steps": "20", "CFG scale": "1.0", "Seed": "0", "Size": "16x16", "Model": "model0/model", "Weights": "ema"}),
    ("--class_label bob --guidance_scale 2 --guidance_rescale 0.7 --weights raw",
     {"Class": "bob", "CFG scale": "2.0", "Guidance rescale": "0.7", "Weights": "raw"}),
    ("--class_label 1 --seed 9", {"Class": "bob", "Seed": "9"}), ("--class_label all", {"Class": "bald"}),
])  # fmt: skip
def test_the_text_says_what_ran(model, tmp_path, call, args, expected):
    """T = 20: 25 steps of logsnr spacing are what the message about 25 steps advises."""
    call("sample", "--load_path", model, "--save_folder", tmp_path, "--num_images", 1, *args.split())  # fmt: skip
    found = text_of(tmp_path / "images" / "000000.png")
    assert {name: found.get(name) for name in expected} == expected
    assert found["Objective"] == "v" and found["Precision"] == "float32"
    # the settings that it names give the picture again
    pipeline = load(model, found["Weights"])
    sampler = {"DDIM": "ddim", "DPM++ 2M SDE": "dpmpp_2m_sde"}[found["Sampler"]]
    labels = pipeline.labels(found.get("Class"), [int(found["Image"])])
    again = pipeline.sample(
        [int(found["Image"])], seed=int(found["Seed"]), sampler=sampler, steps=int(found["Steps"]),
        spacing=found["Spacing"], eta=float(found["Eta"]), labels=labels, amp="no",
        guidance_scale=float(found["CFG scale"]),
        guidance_rescale=float(found.get("Guidance rescale", 0)),
    )  # fmt: skip
    image = ((again[0].permute(1, 2, 0) + 1) * 127.5).round()
    assert abs(image.numpy() - pixels(tmp_path / "images" / "000000.png")).max() <= 1


def test_the_text_of_a_latent_model(sd_folder, tmp_path, call):
    image = photo(tmp_path / "photo.png", 64, 32)
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    call("sample", "--sd_path", sd_folder, "--prompt", "a fox, red", "--prompt", "Steps: 3\nb", "--steps", 5,
         "--negative_prompt", "grey", "--init_image", image, "--mask", tmp_path / "mask.png", "--strength", 0.6,
         "--clip_skip", 2, "--vae", f"{sd_folder}/vae", "--save_folder", tmp_path / "s", "--vae_tiling")  # fmt: skip
    file = tmp_path / "s" / "images" / "000000.png"
    found = text_of(file)
    expected = {"Steps": "5", "Denoising strength": "0.6", "Mask": "mask.png", "Init image": "photo.png",
                "Clip skip": "2", "VAE": f"{Path(sd_folder).name}/vae", "CFG scale": "7.5", "VAE tiling": "on", "Objective": "eps"}  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    # the model's scheduler decides on the spacing
    spacing = open_pipeline(None, sd_folder, "ema", CPU, amp="no").scheduler["timestep_spacing"]
    assert found["Spacing"] == spacing
    lines = Image.open(file).text["parameters"].split("\n")
    assert lines[:2] == ["a fox, red", "Negative prompt: grey"]
    assert read_parameters(file) == "a fox, red"
    assert read_parameters(file.with_name("000001.png")) == "Steps: 3\nb"


def test_names_in_the_text_tell_files_apart(tmp_path):
    from diffusion.commands import sample

    for name in ("sd-v1.5", "runs/cats", "runs/dogs"):
        (tmp_path / name).mkdir(parents=True)
    found = [sample.short_name(tmp_path / name) for name in (
        "sd-v1.5", "sd-v1.5/vae", "runs/cats/model.pt", "runs/dogs/adapter.safetensors", "fox.v2.safetensors")]  # fmt: skip
    assert found == ["sd-v1.5", "sd-v1.5/vae", "cats/model", "dogs/adapter", "fox.v2"]
    assert sample.lora_name(("fox.safetensors", 0.123456789)) == "fox:0.123456789"


def test_the_text_of_an_interpolation(model, lora_files, tmp_path, call):
    a, b = lora_files
    call("sample", "--load_path", model, "--save_folder", tmp_path, "--lora_interpolate", a, f"{b}:0.5",
         "--points", 2, "--num_images", 1, "--steps", 2, "--seed", 3)  # fmt: skip
    found = text_of(tmp_path / "interpolation.png")
    assert found["Seed"] == "3" and "a:1 to " in found["Lora interpolation"]


def test_class_names_that_are_no_text(model, tmp_path, call, monkeypatch):
    """A folder from a Latin-1 archive: the picture is saved, its text names what can be named."""

    def renamed(*args, **options):
        pipeline = open_pipeline(*args, **options)
        pipeline.classes[0] = "caf\udce9"
        return pipeline

    monkeypatch.setattr("diffusion.sampling.load.open_pipeline", renamed)
    call("sample", *plain(model, tmp_path), "--num_images", 1, "--class_label", "all")
    assert "udce9" in text_of(tmp_path / "images" / "000000.png")["Class"]


@pytest.mark.parametrize("prompt, negative", [
    ("a fox", ""), ("a fox", "grey"), ("Steps: 20", ""), ("a\nSteps: 3, Seed: 1\nb", "c\nSteps: 2"), ("", "x"), (None, ""),
])  # fmt: skip
def test_prompts_are_read_back(tmp_path, prompt, negative):
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(prompt, negative, {"Steps": 20, "Seed": 1}))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert read_parameters(tmp_path / "a.png") == prompt


def test_measuring_several_calls_at_once_is_said(model, faces, tmp_path, call, monkeypatch, capsys):
    from diffusion.evaluation import __main__ as metrics

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    args = [faces, tmp_path / "images", "--size", 16, "--fid_features", tmp_path / "mean.pt", "--device", "cpu"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for calls in (1, 2):
        call("sample", *plain(model, tmp_path), "--num_images", 4, "--batch_size", 4)
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["metrics", *map(str, args)])
        metrics.main()
        said = capsys.readouterr().out
        assert ("2 calls of sample.py" in said) == (calls == 2)
        assert json.loads(said.strip().splitlines()[-1])["num_fake"] == 4 * calls
