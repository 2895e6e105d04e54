"""The style study: its plan, its measures, its report; stopped and continued."""

import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.data import toy
from diffusion.data.folder import scan
from diffusion.evaluation.distances import frechet_distance, moments
from diffusion.files.output import reserve
from diffusion.pictures.grid import save_png, write_png
from diffusion.study import __main__ as program
from diffusion.study import runner
from diffusion.study.classifier import break_images, open_classifier, to_input
from diffusion.study.experiment import Study, read_images, run_study
from diffusion.study.judge import Judge
from diffusion.study.plan import Plan, Settings
from diffusion.study.report import write_report
from diffusion.study.runner import run_child, sample_arguments, train_arguments
from diffusion.study.study_folder import check_links, create, describe, find, read_metrics
from diffusion.study.styles import (
    PROMPTS,
    read_style,
    replace_name,
    slugs_of,
    style_folders,
    training_folder,
    with_name,
)
from diffusion.training.trainer import train

EVIL = "<script>evil()</script><img src=x onerror=evil()> & \"quotes'"


@pytest.fixture(scope="module")
def base(vae, faces, tmp_path_factory) -> Path:
    """ema.safetensors of a model that reads captions, hardly trained."""
    folder = tmp_path_factory.mktemp("base")
    train(Config(
        mode="latent", vae=str(vae), condition="text", text_encoder="scratch", text_dim=32,
        text_layers=1, text_length=64, layers_per_block=1, unet_dim=16, dim_mults=(1, 2),
        data=str(faces), image_size=16, batch_size=8, time_steps=20, train_steps=12, num_samples=0,
        save_and_sample_every=12, cache_dir=str(folder / "cache"), device="cpu", amp="no",
        save_folder=str(folder / "run"), guidance_scale=2.0,
    ))  # fmt: skip
    return folder / "run" / "ema.safetensors"


@pytest.fixture(scope="module")
def styles(faces):
    return [read_style(f, f.name, 16) for f in style_folders(str(faces))]


@pytest.fixture(scope="module")
def judge(styles, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "classifier.safetensors"
    classifier = open_classifier(path, styles, 0, steps=60)
    return Judge({style.name: style for style in styles}, classifier, None, None)


def settings(data, **options) -> Settings:
    small = dict(
        load_path="base.safetensors",
        steps=4,
        batch_size=4,
        num_images=6,
        sample_steps=2,
        image_size=16,
        guidance_scale=2.0,
        ranks=(1, 2, 4),
        styles=("bald", "bob"),
    )
    if 4 in options.get("experiments", (4,)):
        small |= dict(mix_images=4, points=3)
    return parsed(data=data, **small | options)


def parsed(**options) -> Settings:
    """Parse options as the command line gives them."""
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in options.items()}
    given = [f"--{name}={value}".removesuffix("=") for name, value in text.items()]
    return program.parse(given)[0]


def changed(s: Settings, **options) -> Settings:
    return Settings(**vars(s) | options)


# --- the plan ------------------------------------------------------------------------------------


SLUGS = {"bald": "bald", "bob": "bob", "spiky": "spiky"}


def test_the_experiments_share_their_cells(faces):
    plan = Plan(settings(faces), SLUGS)
    cells = plan.cells()
    assert len(cells) == len({c.name for c in cells})
    kinds = [c.kind for c in cells]
    # 3 bases, 2 LoRAs, 2 other methods, 3 mixtures, and of the ablation what is not the centre
    expected = dict(base=3, lora=2 + 6, textual_inversion=1, dreambooth=1, mix=3)
    assert {kind: kinds.count(kind) for kind in expected} == expected
    centre = plan.lora("bald")
    for what, row in plan.ablation().items():
        low, middle, high = row.values()
        assert middle == centre
        assert getattr(low, what) < getattr(centre, what) < getattr(high, what)
        for cell in (low, high):
            values = {what: getattr(centre, what), "name": centre.name}
            assert dataclasses.replace(cell, **values) == centre
    assert [c.steps for c in plan.methods()["bald"].values()] == [4, 4, 4]
    mixtures = [c for c in cells if c.kind == "mix"]
    assert [c.share for c in mixtures] == [0, 0.5, 1]
    for cell in mixtures:  # both LoRAs are trained before
        trained = plan.trained(cell)
        assert [c.style for c in trained] == ["bald", "bob"]
        assert max(map(cells.index, trained)) < cells.index(cell)
    only_first = Plan(settings(faces, experiments=(1,)), SLUGS).cells()
    assert {c.kind for c in only_first} == {"base", "lora"}


def test_mixtures_take_the_centre_whatever_its_learning_rate(faces):
    plan = Plan(settings(faces, learning_rate=0.00125, experiments=(4,)), SLUGS)
    mixture = plan.cells()[-1]
    assert set(plan.trained(mixture)) < set(plan.cells())


def test_budgets_and_what_is_given_instead():
    given = functools.partial(parsed, data="x", load_path="y")
    small = given()
    assert small.num_images >= 100 and small.ranks == (2, 8, 32) and small.steps >= 300
    assert given(budget="full").steps > small.steps
    assert given(steps=7).steps == 7 and given(styles="a,b,").styles == ("a", "b")
    for wrong, value in dict(
        experiments="1,5", steps=1, ranks="0,1", points=102, learning_rate=-1, num_images=1
    ).items():
        with pytest.raises(UserError, match=f"{wrong} is .*{str(value).replace(',', ', ')}"):
            given(**{wrong: value})
    with pytest.raises(SystemExit):
        given(budget="huge")


# --- styles --------------------------------------------------------------------------------------


def test_styles_are_split_and_named(styles, tmp_path):
    style = styles[0]
    assert (len(style.train), len(style.held_out)) == (32, 8)
    assert not set(style.train.files) & set(style.held_out.files)
    for split in (style.train, style.held_out):
        assert split.files == sorted(split.files)
        assert len(split.captions) == len(split.pixels) == len(split)
        assert all("bald" in caption.lower() for caption in split.captions)
    assert set(style.prompts) <= set(style.held_out.captions)
    folder = training_folder(style, tmp_path / "data", "{}")
    files = sorted(folder.glob("*.png"))
    assert len(files) == 32 and training_folder(style, tmp_path / "data", "{}") == folder
    held_out = {file.read_bytes() for file in style.held_out.files}
    for file in files:
        assert file.read_bytes() not in held_out
    assert scan(folder) == files  # train.py reads them all
    for file in files:
        assert "{}" in file.with_suffix(".txt").read_text()


def test_captions_and_prompts():
    assert with_name("", "manga") == "manga" and with_name("a cat", "manga") == "manga, a cat"
    assert with_name("a MANGA cat", "manga") == "a MANGA cat"
    assert with_name("mangas", "manga") == "manga, mangas"
    assert replace_name("Manga, a cat", "manga", "<m>") == "<m>, a cat"
    assert (
        replace_name("manga, a cat", "manga", "") == "a cat"
        and replace_name("manga", "manga", "") == ""
    )
    assert replace_name("a (b) a", "(b)", r"\1") == r"a \1 a"  # neither is a pattern
    assert slugs_of(["a b", "a-b", "A b", "---"]) == {
        "a b": "a-b", "a-b": "a-b-2", "A b": "A-b-2-2", "---": "style"}  # fmt: skip


def test_validation_prompts_come_first(tmp_path):
    folder = tmp_path / "manga"
    for i in range(6):
        save_png(toy.draw(i, 16), folder / f"{i}.png")
    assert read_style(folder, "manga", 16).prompts == ["manga"]  # no captions at all
    (folder / PROMPTS).parent.mkdir()
    (folder / PROMPTS).write_text("a cat\n\nmanga dog\n")
    assert read_style(folder, "manga", 16).prompts == ["manga, a cat", "manga dog"]
    (folder / PROMPTS).write_text("\n")
    with pytest.raises(UserError, match=PROMPTS.name):
        read_style(folder, "manga", 16)


def test_unusable_images_are_neither_trained_on_nor_held_out(tmp_path, capsys):
    folder = tmp_path / "manga"
    for i in range(6):
        save_png(toy.draw(i, 16), folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    style = read_style(folder, "manga", 16)
    used = sorted([*style.train.files, *style.held_out.files])
    assert [file.name for file in used] == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert "3.png" in capsys.readouterr().out
    for i in (0, 1):
        (folder / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="manga has 3 "):
        read_style(folder, "manga", 16)


# --- measures ------------------------------------------------------------------------------------


def coloured(tmp_path) -> list:
    """Two styles that a glance tells apart."""
    random = np.random.default_rng(0)
    for name, (low, high) in {"dark": (0, 90), "light": (160, 250)}.items():
        for i in range(24):
            noise = random.integers(low, high, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            save_png(noise, tmp_path / name / f"{i}.png")
    return [read_style(tmp_path / name, name, 16) for name in ("dark", "light")]


def test_the_classifier_tells_styles_and_says_how_well(tmp_path):
    dark, light = styles = coloured(tmp_path / "styles")
    path = tmp_path / "c.safetensors"
    judge = open_classifier(path, styles, 0, steps=40)
    assert judge.accuracy > 0.9 and judge.fraction(dark.held_out.pixels, "dark") > 0.9
    assert judge.fraction(dark.held_out.pixels, "light") < 0.1
    # none of them: as the classifier was taught
    net = judge.net
    x = to_input(np.concatenate([dark.train.pixels, light.train.pixels]))
    labels = torch.arange(2).repeat_interleave(len(dark.train))
    mixed = break_images(x, labels, torch.Generator().manual_seed(0))
    assert mixed.shape == x.shape and net(mixed)[1].shape == (len(x), 3)
    again = open_classifier(path, styles, 1, steps=0)  # read, not trained
    for a, b in zip(again.net.state_dict().values(), net.state_dict().values()):
        assert_close(a, b)


def test_shuffled_squares_are_the_same_pixels():
    x = torch.rand(4, 3, 64, 64)
    out = break_images(x, torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(0))
    assert_close(out.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
    assert not torch.equal(out, x)


def test_every_measure_says_what_it_is(judge, styles):
    images = styles[1].held_out.pixels
    found = judge(images, ["a"] * len(images), "bob", "bald")
    assert set(found) == {"style_share", "frechet", "other_style_share", "other_frechet"}
    for one in found.values():
        assert set(one) == {"value", "definition", "model", "num_images"} and one["num_images"] == 8
    assert f"{judge.classifier.accuracy:.1%}" in found["style_share"]["definition"]
    features = judge.classifier.outputs(images)[0]
    assert features.dtype == torch.float64 and abs(found["frechet"]["value"]) < 1e-6
    other = judge.classifier.outputs(styles[0].held_out.pixels)[0]
    assert found["other_frechet"]["value"] == pytest.approx(
        frechet_distance(*moments(features), *moments(other)))  # fmt: skip
    real = judge.real("bob", 5)
    assert real["frechet"]["num_images"] == 5 and real["frechet"]["value"] > 0
    assert real["style_share"]["value"] == judge.classifier.held_out["bob"]


# --- child processes -----------------------------------------------------------------------------


def test_a_failing_child_is_named_with_its_last_words(tmp_path):
    args = ["--data=nowhere", "--device=cpu", f"--save_folder={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"(?s)train\.py.* 1.*error: .*nowhere.*train\.py --data"):
        run_child("train.py", args, tmp_path / "logs.txt")
    assert "nowhere" in (tmp_path / "logs.txt").read_text()


def test_pictures_of_an_earlier_version_are_read(tmp_path):
    """Those that do not say who wrote them, where none does; else only ours."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "000000.png")
    assert read_images(tmp_path).shape == (1, 4, 4, 3)
    save_png(Image.new("RGB", (4, 4), "blue"), tmp_path / "000001.png")
    assert read_images(tmp_path)[:, 0, 0].tolist() == [[0, 0, 255]]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


SCRIPT = """
import signal, sys, time
from pathlib import Path
data = b"x" * 200_000_000
Path(sys.argv[1]).write_text("running")
try:
    while len(sys.argv) == 2: time.sleep(0.05)
except KeyboardInterrupt:
    Path(sys.argv[1]).write_text("stopped")
"""


def test_memory_and_seconds_are_the_childs_own(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    found = run_child("script.py", [str(tmp_path / "state"), "end"], tmp_path / "logs.txt")  # fmt: skip
    assert 200e6 < found["peak_memory"] < 280e6 and 0 < found["cpu_seconds"] < found["seconds"] + 1
    assert found["peak_device_memory"] is None


def test_the_child_of_a_killed_study_stops(tmp_path):
    script, state = tmp_path / "script.py", tmp_path / "state"
    script.write_text(SCRIPT)
    code = ("import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]],"
            " start_new_session=True); time.sleep(60)")  # fmt: skip
    child = [str(ROOT / "diffusion" / "study" / "child.py"), str(tmp_path / "out"), str(script), str(state)]  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code, *child])
    wait_for(state.exists)
    parent.kill()
    parent.wait()
    wait_for(lambda: state.read_text() == "stopped")


def test_arguments_of_the_scripts(faces, tmp_path):
    s = settings(faces, class_prompt="a face", init_word="x")
    cells = {c.kind: c for c in Plan(s, SLUGS).cells()}
    path = Path("here")

    def options(kind, s=s):
        args = train_arguments(s, cells[kind], "bob", path, path, path)
        return dict(a.lstrip("-").split("=", 1) for a in args)

    same = {"data", "train_steps", "batch_size", "loss", "seed", "load_path"}
    lora, ti, dreambooth = map(options, ("lora", "textual_inversion", "dreambooth"))
    assert same <= set(lora) and lora["adapter"] == "lora" and int(lora["rank"]) in s.ranks
    assert ti["token"] == "<bob>" and ti["init_word"] == "x"
    assert dreambooth["instance_prompt"] == "bald" and "adapter" not in dreambooth
    assert dreambooth["class_prompt"] == "a face"
    moved = changed(s, vae="new/vae", sd_path="new/sd")  # where what the base needs is now
    assert {"sd_path": "new/sd", "vae": "new/vae"}.items() <= options("lora", moved).items()
    foreign = options("lora", changed(s, load_path=None, sd_path="sd"))
    assert foreign["sd_path"] == "sd" and foreign["image_size"] == "16" and "load_path" not in foreign  # fmt: skip
    # sample.py knows the options that it knows today
    from diffusion.commands import sample

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    adapters = dict(base=0, dreambooth=0, lora=1, textual_inversion=1, mix=2)
    for kind, count in adapters.items():
        cell = dataclasses.replace(cells[kind], share=0.25)
        args = sample_arguments(s, cell, [Path("a"), Path("b")], prompts, path)
        parsed = sample.parse(args)
        assert parsed.guidance_scale == 2 and parsed.num_images == 3 and parsed.plain_prompts
        assert len(parsed.lora + parsed.embedding) == count
        assert parsed.load_path == ("a" if kind == "dreambooth" else s.load_path)
        args = sample_arguments(moved, cell, [Path("a"), Path("b")], prompts, path)
        assert (sample.parse(args).sd_path, sample.parse(args).vae) == ("new/sd", "new/vae")
    assert parsed.lora == [("a", 0.75), ("b", 0.25)]


# --- complete studies ----------------------------------------------------------------------------


class Fake:
    """train.py and sample.py in no time: training leaves a file, sampling toy faces.

    stop_at: the call at which Ctrl-C is pressed. short_at: the one that ends a step too early.
    """

    def __init__(self, stop_at: int | None = None, short_at: int | None = None):
        self.calls, self.stop_at, self.short_at = [], stop_at, short_at

    def __call__(self, script, args, logs) -> dict:
        assert script == "train.py" or "--overwrite" in args
        options = dict(a.lstrip("-").split("=", 1) for a in args if "=" in a)
        folder = Path(options["save_folder"])
        self.calls.append((script, folder.name))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        if script == "train.py":
            folder.mkdir(parents=True)  # as train.py: never over weights without their checkpoint
            dreambooth = "instance_prompt" in options
            (folder / ("ema.safetensors" if dreambooth else "adapter.safetensors")).write_bytes(
                b"x" * 99
            )
            (folder / "metrics.jsonl").write_text('{"step": 4, "img_per_s": 12.5}\n')
            (folder / "model.pt").write_bytes(b"x")
            step = int(options["train_steps"]) - (len(self.calls) == self.short_at)
            (folder / "metadata.json").write_text(json.dumps({"step": step}))
        else:
            prompts = Path(options["prompt"][1:]).read_text().splitlines()
            with reserve(folder / "images", len(prompts), overwrite=True) as numbers:
                for i in range(len(prompts)):
                    picture = toy.draw(i + len(self.calls), 16)
                    numbers.save(i, lambda path: write_png(picture, path))
                numbers.drop_older()
        return {"seconds": 2.0, "peak_memory": 3 << 20, "peak_device_memory": None}


@pytest.fixture
def study(faces, judge, styles, tmp_path):
    def make(fake, **options) -> Study:
        s = settings(faces, **options)
        about = describe(s)
        folder = find(tmp_path / "results", about)
        folder = folder or create(tmp_path / "results", "my study", about)
        return Study(s, folder, judge, read_metrics(folder), fake)

    return make


def test_sampling_again_deletes_its_own_pictures_only(study):
    one = study(Fake())
    cell = one.cells[0]
    before = one.sample(cell)
    folder = one.folder / "inference" / cell.name
    (folder / "notes.txt").write_text("mine")
    Image.fromarray(toy.draw(0, 16)).save(folder / "images" / "000099.png")
    left = folder / "images" / "000050.png"  # of a call that was stopped
    save_png(toy.draw(1, 16), left)
    after = one.sample(cell)
    assert before.shape == after.shape and not left.exists()
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "images" / "000099.png").is_file()  # fmt: skip


def test_a_stopped_study_continues_and_repeats_nothing(study):
    rest = Fake()
    first = Fake(stop_at=15)  # the first training of the ablation
    one = study(first)
    with pytest.raises(KeyboardInterrupt):
        run_study(one)
    assert not read_metrics(one.folder)["finished"] and (one.folder / "report.html").exists()
    assert "Stopped" in (one.folder / "logs.txt").read_text()
    two = study(rest)
    assert two.folder == one.folder
    report = run_study(two)
    finished = first.calls[:-1]  # those that came to an end
    assert not set(finished) & set(rest.calls)
    cells = {c.name for c in two.cells}
    assert {name for script, name in finished + rest.calls if script == "sample.py"} == cells
    trained = {c.name for c in two.cells if c.steps}
    assert {name for script, name in finished + rest.calls if script == "train.py"} == trained
    metrics = read_metrics(two.folder)
    assert metrics["finished"] and set(metrics["cells"]) == cells and report.is_file()
    attempts = [metrics["cells"][name]["attempts"] for name in trained]
    assert sorted(attempts) == [1] * (len(trained) - 1) + [2]
    # nothing is left to do, and nothing is left lying about
    nothing = Fake()
    run_study(study(nothing))
    assert nothing.calls == []
    for name in trained:
        assert not (two.folder / "checkpoints" / name / "model.pt").exists()
    assert {p.name for p in two.folder.iterdir()} >= {
        "checkpoints", "inference", "thumbnails", "config.json", "metrics.json", "logs.txt", "report.html"}  # fmt: skip


def test_training_is_not_repeated_when_sampling_was_stopped(study):
    first = Fake(stop_at=5)  # base, base, base, train, sample
    with pytest.raises(KeyboardInterrupt):
        run_study(study(first, experiments=(1,)))
    assert first.calls[-2][0] == "train.py" and first.calls[-1][0] == "sample.py"
    second = Fake()
    run_study(study(second, experiments=(1,)))
    assert second.calls[0] == first.calls[-1] and first.calls[-2] not in second.calls


def test_a_training_that_was_stopped_by_others_does_not_count(study):
    with pytest.raises(UserError, match="step 3 of 4"):
        run_study(study(Fake(short_at=4), experiments=(1,)))
    second = Fake()
    run_study(study(second, experiments=(1,)))
    assert [script for script, _ in second.calls] == ["train.py", "sample.py"] * 2


def test_other_settings_are_another_study(study):
    a, b = study(Fake()), study(Fake(), seed=1)
    assert a.folder != b.folder and study(Fake()).folder == a.folder
    assert study(Fake(), seed=1).folder == b.folder
    prompts = [study(Fake(), class_prompt=text).folder for text in ("a/face", "the/face")]
    assert prompts[0] != prompts[1]


def test_a_folder_of_the_first_edition_is_found(tmp_path):
    """Its config.json, as it was written; pictures and weights of a known time."""
    data = tmp_path / "data"
    base = tmp_path / "ema.safetensors"
    files = [data / "a" / "1.png", data / "b" / "sub" / "2.png", data / "b" / "2.txt", base]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        os.utime(file, ns=(10**18, 10**18))
    numbers = {"steps": 4, "batch_size": 32, "ranks": [2, 8, 32], "targets": "all", "learning_rate": 0.003,
               "ti_learning_rate": 0.02, "dreambooth_learning_rate": 0.001, "vectors": 4, "num_images": 100,
               "mix_images": 40, "sample_steps": 20, "sampler": "dpmpp_2m", "points": 5}  # fmt: skip
    unset = ("sd_path", "sd_config", "features", "clip", "image_size", "class_prompt", "init_word",
             "guidance_scale")  # fmt: skip
    chosen = {"data": str(data), "load_path": str(base), "styles": ["a", "b"], "experiments": [1, 2, 3, 4],
              "budget": "small", "seed": 0, "device": "cpu", "amp": "no"}  # fmt: skip
    written = {
        "settings": chosen | dict.fromkeys(unset) | numbers,
        "base": f"{base.resolve()} 1 {10**18}",
        "data": {
            "a": "21288f469a4aa23f55e900e40f40682d",
            "b": "6bba7e58801797e8011103df2e23181c",
        },
    }
    folder = tmp_path / "results" / "2026-01-01_000000_data"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(written))
    args = ["--data", data, "--load_path", base, "--steps", 4, "--device", "cpu", "--amp", "no"]
    s = program.choose_styles(program.parse(list(map(str, args)))[0])
    assert find(tmp_path / "results", describe(s)) == folder
    assert find(tmp_path / "results", describe(changed(s, steps=5))) is None


def test_changed_data_is_another_study(tmp_path):
    for style in ("a", "b"):
        save_png(toy.draw(1, 16), tmp_path / "data" / style / "1.png")
    s = settings(tmp_path / "data", styles=("a",))
    folder = create(tmp_path / "r", "x", describe(s))
    assert find(tmp_path / "r", describe(s)) == folder
    (tmp_path / "data" / "a" / "1.txt").write_text("new")
    assert find(tmp_path / "r", describe(s)) is None


def test_a_changed_base_is_another_study(tmp_path):
    save_png(toy.draw(1, 16), tmp_path / "data" / "a" / "1.png")
    (weights := tmp_path / "sd" / "unet" / "weights.bin").parent.mkdir(parents=True)
    weights.write_text("first")
    s = settings(tmp_path / "data", styles=("a",))
    s = changed(s, load_path=None, sd_path=str(tmp_path / "sd"))
    before = describe(s)
    assert before == describe(s)
    weights.write_text("another")
    assert before != describe(s)


# --- what lies in its folders --------------------------------------------------------------------


def test_what_is_shown_to_others_names_no_folder(study, tmp_path):
    """Neither the way to a file nor the computer; and no picture of the data, unless asked for."""
    one = study(Fake(), experiments=(1,), load_path=tmp_path / "base.safetensors")
    report = run_study(one)
    for file in (report, one.folder / "config.json", one.folder / "metrics.json"):
        text = file.read_text()
        assert str(tmp_path) not in text and platform.node() not in re.findall(r"[\w.-]+", text)
    assert "base.safetensors" in report.read_text()
    assert not list(one.folder.rglob("real_*")) and not (one.folder / "data").exists()
    two = study(Fake(), experiments=(1,), load_path=tmp_path / "base.safetensors", keep_images="")
    assert two.folder == one.folder
    two.metrics["cells"].clear()
    run_study(two)
    assert len(list((two.folder / "data" / "bald").glob("*.png"))) == 32
    assert (two.folder / "thumbnails" / "real_bald.png").is_file()


def test_a_study_stopped_keeps_no_training_images(study):
    one = study(Fake(stop_at=6), experiments=(1,))
    with pytest.raises(KeyboardInterrupt):
        run_study(one)
    assert not (one.folder / "data").exists() and one.metrics["cells"]


ODD = [
    None,
    0,
    -1,
    True,
    "x",
    "",
    [],
    {},
    [[1]],
    {"a": {"b": 0}},
    1e300,
    10**400,
    "../../x\n\x1b[31m",
]


def places(value, above=()):
    """Every place within JSON."""
    yield above
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*above, key))


def fuzz(file: Path):
    """Write a JSON anew with each of its values replaced by odd ones; yield where, and the value."""
    good = json.loads(file.read_text())
    for place in places(good):
        for odd in ODD:
            bad = json.loads(json.dumps(good))
            within = functools.reduce(lambda level, key: level[key], place[:-1], bad)
            if place:
                within[place[-1]] = odd
            file.write_text(json.dumps(bad if place else odd))
            yield place, odd
    file.write_text(json.dumps(good))


def test_settings_of_wrong_types_are_another_study(study, tmp_path):
    one = study(Fake())
    about = json.loads((one.folder / "config.json").read_text())
    for place, odd in fuzz(one.folder / "config.json"):
        same = place and functools.reduce(lambda level, key: level[key], place, about) == odd
        assert find(tmp_path / "results", about) == (one.folder if same else None) or odd is True
    for text in ("", "[" * 9000, "null", '{"settings": {"data": 1e999}}', "\xff"):
        (one.folder / "config.json").write_bytes(text.encode("latin-1"))
        assert find(tmp_path / "results", about) is None
    (one.folder / "config.json").unlink()
    os.mkfifo(one.folder / "config.json")
    assert find(tmp_path / "results", about) is None


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_state_of_wrong_types_is_measured_anew(study, every):
    """A cell whose entry no study can have written is done again, and the page shows the others."""
    one = study(Fake(), experiments=(1,))
    run_study(one)
    file = one.folder / "metrics.json"
    good = json.loads(file.read_text())
    name = next(c.name for c in one.cells if c.kind == "lora")
    del good["real"]
    good["cells"] = {n: e for n, e in good["cells"].items() if n in (name, "base_bald")}
    for entry in good["cells"].values():
        del entry["sha256"]  # as of older studies: by the types alone
    file.write_text(json.dumps(good))
    again = 0
    for place, odd in islice(fuzz(file), 0, None, every):
        try:
            two = study(Fake(), experiments=(1,))
        except UserError as error:
            assert str(file) in str(error) and not isinstance(odd, dict)
            continue
        two.metrics["real"] = one.metrics["real"]
        if place[:1] != ("cells",):  # with a damaged entry it is not finished
            right = place != () and (place != ("finished",) or odd is True)
            assert two.metrics["finished"] is right
        write_report(two)
        again += len(two.metrics["cells"]) < 2
        for cell in filter(two.done, two.cells):
            assert two.entry(cell)["name"] == cell.name
    assert again > 10
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_metrics(one.folder)


def test_a_changed_digit_is_noticed(study):
    """The cell is done again, also of a study that was finished."""
    one = study(Fake(), experiments=(1,))
    run_study(one)
    file = one.folder / "metrics.json"
    good = file.read_text()
    assert read_metrics(one.folder)["finished"]
    value = json.loads(good)["cells"]["base_bald"]["measures"]["frechet"]["value"]
    file.write_text(good.replace(str(value), f"9{value}"))
    found = read_metrics(one.folder)
    assert not found["finished"] and "base_bald" not in found["cells"] and len(found["cells"]) == 4
    name = next(c.name for c in one.cells if c.steps)
    value = json.loads(good)["cells"][name]["cost"]["file_bytes"]
    file.write_text(file.read_text().replace(f'"file_bytes": {value}', '"file_bytes": 9', 1))
    again = Fake()
    run_study(study(again, experiments=(1,)))
    expected = [("sample.py", "base_bald"), ("train.py", name), ("sample.py", name)]
    assert again.calls == expected and read_metrics(one.folder)["finished"]


def test_samples_that_have_gone_or_changed_are_named(study):
    one = study(Fake())
    images = one.folder / "inference" / "x" / "images"
    with pytest.raises(UserError, match=str(images)):
        read_images(images)
    for i in range(2):
        save_png(toy.draw(i, 16 + i), images / f"{i:06d}.png")
    with pytest.raises(UserError, match=str(images)):
        read_images(images)


def test_links_in_a_study_are_not_followed(base, faces, tmp_path, monkeypatch):
    args = ["--load_path", base, "--data", faces, "--styles", "bald,bob"]
    s = program.choose_styles(program.parse([*map(str, args), "--device", "cpu"])[0])
    folder = create(tmp_path / "out", "x", describe(s))
    (mine := tmp_path / "mine" / "bald").mkdir(parents=True)
    (folder / "data").symlink_to(mine.parent)
    with pytest.raises(UserError, match=str(folder / "data")):
        call(monkeypatch, tmp_path, *args)
    assert mine.is_dir()
    (folder / "data").rename(folder / "a\nerror: b")
    with pytest.raises(UserError, match="error: b") as told:
        check_links(folder)
    assert "\n" not in str(told.value)
    (tmp_path / "notes.txt").write_text("mine")
    (logs := folder / "logs.txt").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(OSError):
        run_child("train.py", [], logs)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def pictures_of(folder: Path) -> Path:
    for i in range(6):
        save_png(toy.draw(i, 16), folder / f"{i}.png")
    return folder


def test_links_do_not_publish_private_texts(tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    folder = pictures_of(tmp_path / "styles" / "manga")
    (folder / PROMPTS).parent.mkdir()
    (folder / PROMPTS).symlink_to(secret)
    with pytest.raises(UserError, match=PROMPTS.name):
        read_style(folder, "manga", 16)
    (folder / PROMPTS).unlink()
    os.mkfifo(folder / PROMPTS)
    with pytest.raises(UserError, match=PROMPTS.name):
        read_style(folder, "manga", 16)
    (folder / "own.txt").write_text("a cat")  # a link within the folder is the data's own
    (folder / PROMPTS).unlink()
    (folder / PROMPTS).symlink_to(folder / "own.txt")
    assert read_style(folder, "manga", 16).prompts == ["manga, a cat"]


def test_names_that_are_no_words_are_refused(tmp_path):
    for name in ("a\nerror: b", "a\x1b[31m", os.fsdecode(b"\xff")):
        pictures_of(tmp_path / "styles" / name)
        with pytest.raises(UserError) as told:
            style_folders(str(tmp_path / "styles"))
        assert "\n" not in str(told.value) and "\x1b" not in str(told.value)
        (tmp_path / "styles" / name).rename(tmp_path / f"{len(name)}")


def test_a_damaged_classifier_is_trained_again(tmp_path, styles, capsys):
    file = tmp_path / "c.safetensors"
    good = open_classifier(file, styles, 0, steps=2).net.state_dict()
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    random = np.random.default_rng(0)
    for i in [3, 20, *random.integers(8 + length, len(raw), 4)]:
        damaged = bytearray(raw)
        damaged[i] ^= 1 << 6
        file.write_bytes(damaged)
        found = open_classifier(file, styles, 0, steps=2).net.state_dict()
        assert all(torch.equal(found[k], good[k]) for k in good)
        assert str(file) in capsys.readouterr().out


@pytest.mark.slow
def test_numbers_carry_their_definitions(study):
    one = study(Fake())
    run_study(one)
    metrics = read_metrics(one.folder)
    for entry in metrics["cells"].values():
        count = 4 if entry["kind"] == "mix" else 6
        for measure in entry["measures"].values():
            assert measure["definition"] and measure["model"] and measure["num_images"] == count
        if entry["kind"] in ("lora", "dreambooth", "textual_inversion"):
            assert entry["cost"]["file_bytes"] == 99 and entry["cost"]["images_per_second"] == 12.5
    assert "4 or 6 images" in write_report(one).read_text(encoding="utf-8")
    strip = np.asarray(Image.open(one.folder / "thumbnails" / "interpolation.png"))
    assert strip.shape[0] > 4 * 96 and strip.shape[1] > 3 * 96
    name = next(c.name for c in one.cells if c.kind == "textual_inversion")
    prompts = (one.folder / "inference" / name / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 6 and all("<bald>" in p for p in prompts)
    mixed = next(c for c in one.cells if c.kind == "mix")
    assert not any({"bald", "bob"} & set(p.split()) for p in one.prompts(mixed))


# --- the report ----------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_complete_and_escapes_everything(study, tmp_path, styles):
    one = study(Fake())
    run_study(one)
    evil = dataclasses.replace(styles[0], name=EVIL, slug="evil", prompts=[EVIL])
    base = next(c for c in one.cells if c.kind == "base")
    one.metrics["cells"][base.name]["prompts"] = [EVIL, "$title ${base} $"]
    one.metrics["cells"][base.name]["measures"]["frechet"]["definition"] = EVIL
    one.settings = changed(one.settings, data=f"data/{EVIL.replace('/', '_')}", load_path=EVIL)  # fmt: skip
    one.judge = dataclasses.replace(one.judge, styles=one.styles | {EVIL: evil})
    one.plan.slugs[EVIL] = "evil"
    one.metrics["real"][EVIL] = one.metrics["real"]["bald"]
    one.cells.append(one.plan.base(EVIL))
    one.metrics["cells"]["base_evil"] = dict(one.metrics["cells"][base.name])
    text = write_report(one).read_text()
    page = Tags()
    page.feed(text)
    assert page.open == []
    tags = [tag for tag, _ in page.seen]
    assert "script" not in tags and not any("onerror" in a for _, a in page.seen)
    assert EVIL in "".join(page.text) and "$title ${base} $" in "".join(page.text)
    assert all(a["src"].startswith("data:image/png;base64,") for t, a in page.seen if t == "img")
    assert all(a.get("alt") for t, a in page.seen if t == "img")
    assert not any(a.get("href") for _, a in page.seen) and len(text) < 3_000_000
    headings = "".join(page.text)
    for text in ("1. A LoRA for each style", "2. Ablation", "3. Three methods", "4. From bald to bob",
                 "DreamBooth", "Textual Inversion", "real images", "base, untouched"):  # fmt: skip
        assert text in headings
    assert tags.count("table") == 1 + 1 + 2 + 3 + 1 + 1


# --- mistakes, as a user makes them --------------------------------------------------------------


def call(monkeypatch, tmp_path, *args):
    monkeypatch.setattr(sys, "argv", ["study", *map(str, args), "--save_folder", str(tmp_path / "out"),
                                      "--device", "cpu"])  # fmt: skip
    program.main()


def test_mistakes_are_found_before_anything_is_written(
    monkeypatch,
    tmp_path,
    faces,
    base,
    model,
    vae,
):
    (tmp_path / "empty" / "style").mkdir(parents=True)
    flat = tmp_path / "flat"
    for i in range(5):
        save_png(toy.draw(i, 16), flat / f"{i}.png")
        save_png(toy.draw(i, 16), tmp_path / "single" / "only" / f"{i}.png")
    on, two = ("--load_path", base), ("--styles", "bald,bob")
    for args, named in (
        ((*on,), "--data"),
        (("--data", faces), "--sd_path or --load_path"),
        ((*on, "--data", tmp_path / "none"), "--data .*none"),
        ((*on, "--data", tmp_path / "empty"), "--data .*empty"),
        ((*on, "--data", flat), "--data .*flat.* one folder per style"),
        ((*on, "--data", faces, "--styles", "bald,manga"), "--styles.*'manga'.*bald, bob, spiky"),
        ((*on, "--data", faces, "--styles", "bald"), "experiment 4 .*'bald'"),
        ((*on, "--data", faces, "--experiments", "7"), "experiments is .*7"),
        ((*on, "--data", tmp_path / "single", "--experiments", "1"), "single .*--features"),
        (("--load_path", tmp_path / "no.pt", "--data", faces), "no.pt"),
        (("--load_path", model, "--data", faces), "model.pt .*--condition text"),
        (("--load_path", vae / "model.pt", "--data", faces), "is a VAE"),
        ((*on, "--data", faces, *two, "--sampler", "heuns"), "heuns"),
        ((*on, "--data", faces, *two, "--clip", tmp_path / "none"), "none"),
        ((*on, "--data", faces, *two, "--features", tmp_path / "none"), "none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=named):
            call(monkeypatch, tmp_path, *args)
    assert not (tmp_path / "out").exists()


def test_a_finished_study_says_so(study, monkeypatch, tmp_path, faces, capsys):
    s = program.choose_styles(program.parse([
        "--load_path", "base.safetensors", "--data", str(faces), "--experiments", "1"])[0])  # fmt: skip
    folder = create(tmp_path / "out", "x", describe(s))
    (folder / "metrics.json").write_text(json.dumps({"finished": True, "cells": {}}))
    (folder / "report.html").write_text("")
    monkeypatch.setattr(sys, "argv", ["study", "--load_path", "base.safetensors", "--data", str(faces),
                                      "--experiments", "1", "--save_folder", str(tmp_path / "out")])  # fmt: skip
    program.main()
    assert "finished" in capsys.readouterr().out


# --- with the real scripts -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_study_killed_and_resumed(base, faces, tmp_path):
    args = ["--load_path", base, "--data", faces, "--styles", "bald,bob", "--steps", 4, "--batch_size", 4,
            "--ranks", 2, "--num_images", 4, "--mix_images", 4, "--points", 2, "--sample_steps", 2,
            "--device", "cpu", "--amp", "no", "--save_folder", tmp_path / "out"]  # fmt: skip
    command = [sys.executable, "-m", "diffusion.study", *map(str, args)]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("out/*/checkpoints/lora_bald_*/config.json")), 200)
    first.kill()
    first.wait()
    (folder,) = (tmp_path / "out").iterdir()
    before = read_metrics(folder)
    assert not before["finished"] and before["cells"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{folder}, a study of the same" in done.stdout and "report.html" in done.stdout
    after = read_metrics(folder)
    assert after["finished"] and list((tmp_path / "out").iterdir()) == [folder]
    for name, entry in before["cells"].items():
        if "measures" in entry:
            assert after["cells"][name] == entry
    costs = {e["kind"]: e["cost"] for e in after["cells"].values() if "cost" in e}
    assert costs["textual_inversion"]["file_bytes"] < costs["lora"]["file_bytes"] < costs["dreambooth"]["file_bytes"]  # fmt: skip
    pictures = {name: (folder / "inference" / name / "images" / "000000.png").read_bytes() for name in after["cells"]}  # fmt: skip
    centre = {e["style"]: n for n, e in after["cells"].items()
              if e["kind"] == "lora" and (e["rank"], e["steps"], e["learning_rate"]) == (2, 4, 1e-3)}  # fmt: skip
    for name in (centre["bald"], "textual_inversion_bald", "dreambooth_bald"):
        assert pictures[name] != pictures["base_bald"]
    assert (folder / "thumbnails" / "interpolation.png").is_file()
    page = Tags()
    page.feed((folder / "report.html").read_text())
    assert page.open == []
