"""What a folder of images is taken for: the program's own folders, thumbnails, splits."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT
from helpers import same
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import UserError, load
from diffusion.config import Config
from diffusion.data import toy
from diffusion.data.batches import Batches
from diffusion.data.captions import Selection
from diffusion.data.folder import scan, scan_split
from diffusion.data.pixels import Pixels
from diffusion.data.sources import configured, folder_set, open_data
from diffusion.files import checkpoint, owned
from diffusion.study.styles import read_style, style_folders
from diffusion.training import trainer

TINY = (
    "--image_size 8 --unet_dim 8 --dim_mults 1,2 --heads 2 --batch_size 4 --time_steps 10 "
    "--save_and_sample_every 2 --num_samples 4 --sample_steps 2 --device cpu --amp no"
).split()


def pictures(root, *names, ours: bool = False) -> None:
    """Small images; ours: with the text that this program's pictures have."""
    for i, name in enumerate(names):
        file = Path(root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        info = PngInfo()
        if ours:
            info.add_text("Software", owned.SOFTWARE)
        options = {"pnginfo": info} if file.suffix.lower() == ".png" else {}
        Image.fromarray(toy.draw(i, 8)).save(file, **options)


def train(folder, *args):
    done = warm.script("train.py", *TINY, *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the program's own folders -------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("--data", "."),
        ("--data", ".", "--save_folder", "out/run", "--cache_dir", "cache"),
        ("--data", ".", "--save_folder", "link"),
        ("--data", ".", "--save_folder", "."),
        ("--data", "{here}", "--save_folder", "results"),
    ],
    ids=" ".join,
)
def test_a_run_inside_its_own_data_continues(tmp_path, args):
    """It sees the user's images only, before and after it has written its own."""
    pics = tmp_path / "pics"
    pictures(pics, *(f"{i}.png" for i in range(5)), "images/5.png", "samples/6.jpg")
    if "link" in args:
        (pics / "results").mkdir()
        (pics / "link").symlink_to("results")
    args = [a.replace("{here}", str(pics)) for a in args]
    first = train(pics, *args, "--train_steps", "2")
    again = train(pics, *args, "--train_steps", "4")
    for out in (first, again):
        assert "7 images to train on" in out
    assert "from step 2" in again and "samples" in again and "left out" in again
    run = pics / (args[args.index("--save_folder") + 1] if "--save_folder" in args else "results")
    found = json.loads((run / "metadata.json").read_text())
    assert (found["step"], found["num_train_images"], found["num_held_out"]) == (4, 7, 0)
    assert len(list((run / "samples").glob("step_*.png"))) == 2


def test_what_other_commands_write_is_left_out(tmp_path, capsys):
    """Marked folders, runs, studies and sheets; but not what only looks like one."""
    mine = ["0.png", "a/1.png", "a/grid.png", "mygrid.png", "b/2.png"]
    pictures(tmp_path, *mine)
    pictures(tmp_path, "out/images/0.png", "out/images/1.png", "old/samples/0.png", "study/x/0.png")
    pictures(tmp_path, "grid.png", "a/grid_2.png", "interpolation.png", "a/interpolation_1.png",
             ours=True)  # fmt: skip
    owned.mark(tmp_path / "out" / "images")
    run = dict.fromkeys(owned.RUN_KEYS, 1)
    (tmp_path / "old" / "config.json").write_text(json.dumps(run))
    (tmp_path / "study" / "config.json").write_text(json.dumps(dict.fromkeys(owned.STUDY_KEYS, 1)))
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model": "mine", "seed": 1}))
    assert sorted(folder_set(tmp_path).names) == sorted(mine)
    out = capsys.readouterr().out
    assert "left out: 8 images" in out
    for part in ("2 in out/images/", "1 in old/", "1 in study/", "2 in a/"):
        assert part in out, part


def test_a_folder_that_is_named_is_read_whatever_it_is(tmp_path):
    pictures(tmp_path / "out" / "images", "0.png", "1.png", ours=True)
    owned.mark(tmp_path / "out" / "images")
    assert len(scan(tmp_path / "out" / "images")) == 2
    with pytest.raises(UserError, match="no images below.*2 images.*images/"):
        folder_set(tmp_path / "out")


SAMPLED = ("images/000000.png", "images/000001.png")  # as sample.py names them


@pytest.mark.parametrize(
    "written, named",
    [
        (SAMPLED, "2 in images/"),
        (("results/metrics/quality.png", "results/metrics/quality_2.png"), "2 in results/metrics/"),
        (
            ("results/samples/step_00000002.png", "old/samples/step_100000000.png"),
            "1 in old/samples/",
        ),
        (("reg/00000.png", "cache/class-1f/00001.png"), "1 in reg/"),
        (("viz/forward.png", "viz/forward_t05.png", "viz/curves.png"), "3 in viz/"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_ours_are_known_without_a_marked_folder(tmp_path, written, named, capsys):
    """By their names and the text in them; somebody's files of such names are read."""
    mine = ["images/holiday.png", "images/000007.png", "reg/00009.png", "quality.png", "step_1.png"]
    pictures(tmp_path, *mine)
    pictures(tmp_path, *written, ours=True)
    pictures(tmp_path, "mine/renamed.png", ours=True)
    assert sorted(folder_set(tmp_path).names) == sorted([*mine, "mine/renamed.png"])
    out = capsys.readouterr().out
    assert f"left out: {len(written)} images" in out and named in out


def test_sampled_pictures_alone_are_a_data_set(tmp_path):
    """Copied into a folder of their own; but sheets, and what lies beside others, are not."""
    pictures(tmp_path / "a", "cat/000000.png", "dog/000001.png", ours=True)
    assert folder_set(tmp_path / "a").classes == ["cat", "dog"]
    pictures(tmp_path / "b", "grid.png", "images/000000.png", ours=True)
    with pytest.raises(UserError, match="no images below.*2 images.*1 in ./.*1 in images/"):
        folder_set(tmp_path / "b")
    owned.mark(tmp_path / "c" / "images")  # and with others, where the folder that is named is ours
    pictures(tmp_path / "c" / "images", "000000.png", "000001.png", ours=True)
    pictures(tmp_path / "c" / "images", "mine.png")
    assert len(folder_set(tmp_path / "c" / "images")) == 3


def test_a_folder_of_numbered_pictures_takes_no_time(tmp_path):
    """One header each is read, no pixels."""
    pictures(tmp_path, "000000.png")
    for i in range(1, 2000):
        os.link(tmp_path / "000000.png", tmp_path / f"{i:06d}.png")
    scan(tmp_path)
    began = time.perf_counter()
    assert len(scan(tmp_path)) == 2000
    assert time.perf_counter() - began < 2


def test_other_commands_pictures_through_the_commands(tmp_path):
    """sample.py beside somebody's photographs, and in a folder with a hidden file."""
    pictures(tmp_path / "images", *(f"{i}.png" for i in range(5)))
    train(tmp_path, "--data", "images", "--save_folder", "run", "--train_steps", "2")
    (tmp_path / "results" / "images").mkdir(parents=True)
    (tmp_path / "results" / "images" / ".DS_Store").write_bytes(b"Bud1")
    for folder in (".", "results"):
        args = ("--load_path", "run/model.pt", "--num_images", 3, "--save_folder", folder,
                "--steps", 2, "--device", "cpu", "--amp", "no")  # fmt: skip
        done = warm.script("sample.py", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert owned.is_ours(tmp_path / "results" / "images")
    (tmp_path / "run" / "config.json").unlink()
    out = train(tmp_path, "--data", ".", "--save_folder", "again", "--train_steps", "1")
    assert "5 images to train on" in out and "3 in images/" in out and "3 in results/images/" in out
    out = train(tmp_path, "--data", "results/images", "--save_folder", "own", "--train_steps", "1")
    assert "3 images to train on" in out
    shutil.rmtree(tmp_path / "results" / "images")
    (tmp_path / "results" / "images").symlink_to("gone")
    done = warm.script("sample.py", *args, cwd=tmp_path)
    assert done.returncode == 1 and "results/images is a link to gone" in done.stderr


def test_a_study_takes_no_results_for_a_style(tmp_path):
    for name in ("manga", "comic", "results"):
        pictures(tmp_path / name, "0.png")
    owned.mark(tmp_path / "results")
    assert [f.name for f in style_folders(str(tmp_path))] == ["comic", "manga"]


# --- other programs' folders ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "__MACOSX", ".thumbnails", "#recycle", "$RECYCLE.BIN", "lost+found", "@EADIR"],
)
def test_thumbnails_and_deleted_files_are_left_out(tmp_path, name, capsys):
    pictures(tmp_path, "0.png", "sub/1.png")
    pictures(tmp_path, f"{name}/0.jpg", f"sub/{name}/deep/1.jpg")
    images = folder_set(tmp_path)
    assert images.names == ["0.png", "sub/1.png"] and images.classes == ["sub"]
    out = capsys.readouterr().out
    if not name.startswith("."):
        assert "left out: 2 images" in out and f"1 in {name}/" in out and f"sub/{name}/" in out


def test_files_that_are_not_looked_at_are_counted(tmp_path, capsys):
    pictures(tmp_path, "0.png")
    for name in ("a.mp4", "b.mp4", "sub/c.PSD", "d.zip", "README", ".hidden", "0.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    folder_set(tmp_path)
    out = capsys.readouterr().out
    for part in (".mp4 (2)", ".psd (1)", ".zip (1)", "README (1)", ".json (1)"):
        assert part in out
    assert "hidden" not in out


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("other", ["valid", "validation", "val", "dev", "Test", "eval"])
def test_the_train_split_is_used_alone(tmp_path, train, other, capsys):
    pictures(tmp_path, f"{train}/cat/0.png", f"{train}/dog/1.png", f"{train}/cat/2.png")
    pictures(tmp_path, f"{other}/cat/3.png", f"{other}/bird/4.png", "stray.png", "extra/5.png")
    images = folder_set(tmp_path)
    assert images.names == ["cat/0.png", "cat/2.png", "dog/1.png"]
    assert images.classes == ["cat", "dog"] and images.labels == [0, 0, 1]
    out = capsys.readouterr().out
    for part in (
        f"{train}/ (3 images)",
        f"{other}/ (2)",
        "extra/ (1)",
        "./ (1)",
        "cat (2)",
    ):
        assert part in out, part


@pytest.mark.parametrize(
    "split, names, classes",
    [
        ("valid", ["cat/1.png"], ["cat"]),
        ("validation", ["cat/1.png"], ["cat"]),
        ("test", ["2.png"], []),
        ("TEST", ["2.png"], []),
        ("extra", ["3.png"], []),
        ("all", ["0.png", "extra/3.png", "test/2.png", "train/cat/0.png", "valid/cat/1.png"],
         ["cat", "extra"]),
    ],
)  # fmt: skip
def test_a_split_by_its_name(tmp_path, split, names, classes):
    pictures(tmp_path, "train/cat/0.png", "valid/cat/1.png", "test/2.png", "extra/3.png", "0.png")
    images = folder_set(tmp_path, selection=Selection(split=split))
    assert images.names == names and images.classes == classes
    with pytest.raises(UserError, match="--split nope.*train/.*valid/"):
        folder_set(tmp_path, selection=Selection(split="nope"))


def test_splits_inside_class_folders(tmp_path, capsys):
    pictures(tmp_path, "cat/train/0.png", "cat/Test/1.png", "dog/train/a/2.png", "bird/3.png")
    pictures(tmp_path, "fish/valid/4.png", "cat/5.png", "stray.png")
    images = folder_set(tmp_path)
    assert images.names == ["bird/3.png", "cat/train/0.png", "dog/train/a/2.png"]
    assert [images.classes[label] for label in images.labels] == ["bird", "cat", "dog"]
    out = capsys.readouterr().out
    assert (
        "cat/Test/ (1)" in out
        and "fish/valid/ (1)" in out
        and "cat/ (1)" in out
        and "./ (1)" in out
    )
    test = folder_set(tmp_path, selection=Selection(split="test"))
    assert test.names == ["cat/Test/1.png"]


def test_without_a_train_split_nothing_is_guessed(tmp_path, capsys):
    pictures(tmp_path / "a", "valid/0.png", "test/1.png", "stray.png")
    with pytest.raises(UserError, match="no train split.*test/, valid/.*--split"):
        folder_set(tmp_path / "a")
    pictures(tmp_path / "b", "train/0.png", "Train/1.png", "test/2.png")
    if len(list((tmp_path / "b").iterdir())) == 3:  # not where both are one folder
        with pytest.raises(UserError, match="Train/, train/.*--split"):
            folder_set(tmp_path / "b")
        assert folder_set(tmp_path / "b", selection=Selection("train")).names == ["0.png"]
    pictures(tmp_path / "c", "train/0.png", "bus/1.png", "car/2.png")  # a class named train
    assert folder_set(tmp_path / "c").classes == ["bus", "car", "train"]
    assert "train/ used" in capsys.readouterr().out
    pictures(tmp_path / "d", "train/cat/0.png", "1.png")
    assert folder_set(tmp_path / "d").names == ["cat/0.png"]


def test_plain_folders_are_as_they_were(tmp_path, faces):
    """Names, classes and so the order of runs begun before: by a walk of our own."""
    expected = sorted(
        (f.relative_to(faces).as_posix() for f in faces.rglob("*.png")), key=os.fsencode
    )
    images = folder_set(faces)
    assert images.names == expected and images.classes == ["bald", "bob", "spiky"]
    shutil.copytree(faces, tmp_path / "afhq" / "train")
    assert folder_set(tmp_path / "afhq").order_key() == images.order_key()


@pytest.mark.parametrize(
    "taken, other",
    [
        ("training_set", "test_set"), ("train2017", "val2017"), ("train_images", "test_images"),
        ("seg_train", "seg_test"), ("Training Set", "Test Set"), ("trn", "tst"),
        ("Train ", "Test "), ("train", "holdout"), ("train-data", "held_out"), ("trainset", "testset"),
        ("images_train", "images_val"), ("train_256", "test1"), ("TrainDataset", "TestDataset"),
    ],
)  # fmt: skip
def test_the_field_s_names_of_splits(tmp_path, taken, other, capsys):
    pictures(tmp_path, f"{taken}/cat/0.png", f"{taken}/dog/1.png", f"{other}/cat/2.png")
    images = folder_set(tmp_path)
    assert images.names == ["cat/0.png", "dog/1.png"] and images.classes == ["cat", "dog"]
    assert f"{other}/ (1)" in capsys.readouterr().out
    kind = "val" if "val" in other else "test"
    assert folder_set(tmp_path, selection=Selection(split=kind)).names == ["cat/2.png"]


@pytest.mark.parametrize(
    "name",
    "testing equipment,trainer,developer,trains,train station,testament,offset,2017,seg_cat".split(
        ","
    ),
)
def test_classes_that_sound_like_splits(tmp_path, name):
    pictures(tmp_path, "train/0.png", f"{name}/1.png")
    assert folder_set(tmp_path).classes == sorted(["train", name])


def test_a_split_inside_itself(tmp_path):
    """As the archive of Intel's scenes has it."""
    pictures(tmp_path, *(f"seg_train/seg_train/{k}/{k}.png" for k in ("sea", "forest")))
    pictures(tmp_path, "seg_test/seg_test/sea/1.png", "seg_pred/seg_pred/2.png")
    assert folder_set(tmp_path).classes == ["forest", "sea"]
    every = folder_set(tmp_path, selection=Selection(split="all"))
    assert every.classes == ["forest", "sea"] and len(every) == 4


@pytest.mark.parametrize("wrapper", ["dataset", "a/b"])
def test_a_wrapper_is_no_class(tmp_path, wrapper, capsys):
    pictures(tmp_path, *(f"{wrapper}/train/{k}/0.png" for k in ("cat", "dog")))
    pictures(tmp_path, f"{wrapper}/test/cat/1.png", "figures/plot.png")
    images = folder_set(tmp_path)
    assert images.names == ["cat/0.png", "dog/0.png"] and images.classes == ["cat", "dog"]
    assert "figures/" in capsys.readouterr().out
    assert folder_set(tmp_path, selection=Selection(split="test")).classes == ["cat"]
    every = folder_set(tmp_path, selection=Selection(split="all"))
    assert {"cat", "dog"} <= set(every.classes) and len(every) == 4


def test_test_splits_alone_inside_classes(tmp_path, capsys):
    pictures(tmp_path / "a", "cat/test/0.png", "dog/test/1.png")
    with pytest.raises(UserError, match="no train split.*cat/test/, dog/test/.*--split test"):
        folder_set(tmp_path / "a")
    images = folder_set(tmp_path / "a", selection=Selection(split="test"))
    assert images.classes == ["cat", "dog"] and len(images) == 2
    pictures(tmp_path / "b", "cat/train/0.png", "dog/test/1.png")
    assert folder_set(tmp_path / "b").names == ["cat/train/0.png"]
    capsys.readouterr()
    pictures(tmp_path / "c", "cat/0.png", "dog/test/1.png")
    assert len(folder_set(tmp_path / "c")) == 2
    assert "dog/test/ used" in capsys.readouterr().out


def test_metrics_and_styles_use_the_train_split(tmp_path, capsys):
    for folder in ("real/train", "real/test", "fake"):
        pictures(tmp_path / folder, *(f"{i}.png" for i in range(4)))
    assert len(scan_split(tmp_path / "real", None)) == 4
    assert "test/ (4)" in capsys.readouterr().out
    assert len(scan_split(tmp_path / "real", "all")) == 8

    pictures(tmp_path / "styles", *(f"manga/train/{i}.png" for i in range(9)), "manga/test/0.png")
    (folder,) = style_folders(str(tmp_path / "styles"))
    style = read_style(folder, "manga", 8)
    assert len(style.train) + len(style.held_out) == 9 and "test/ (1)" in capsys.readouterr().out
    pictures(tmp_path / "styles", "comic/test/0.png")
    with pytest.raises(UserError, match="comic.*no train split"):
        read_style(tmp_path / "styles" / "comic", "comic", 8)


def test_splits_through_the_command(tmp_path):
    pictures(tmp_path / "data", *(f"Train/{k}/{i}.png" for k in ("cat", "dog") for i in range(3)))
    pictures(tmp_path / "data", "Valid/cat/6.png", "7.png")
    out = train(tmp_path, "--data", "data", "--condition", "class", "--train_steps", "1")
    assert "6 images to train on" in out and "2 classes" in out and "Valid/ (1)" in out
    config = json.loads((tmp_path / "results" / "config.json").read_text())
    config = Config.from_dict(config | {"data": str(tmp_path / "data")})
    assert np.bincount(open_data(*configured(config)).labels).tolist() == [3, 3]
    args = ("--data", "data", "--split", "nope", "--save_folder", "other")
    done = warm.script("train.py", *args, cwd=tmp_path)
    assert done.returncode == 1 and "--split nope" in done.stderr and "Valid/" in done.stderr


# --- links, depth, names -------------------------------------------------------------------------


def test_folders_of_links(tmp_path, capsys):
    """Images, and texts from where they come: a pool's; private texts stay unread, and are named."""
    pictures(tmp_path / "pool", "a.png", "b.png")
    (tmp_path / "pool" / "a.txt").write_text("of the pool")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "private.txt").write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "b.png", "a.txt"):
        (data / name).symlink_to(Path("..", "pool", name))
    for link, target in (("b.txt", "private.txt"), ("metadata.jsonl", "private.txt")):
        (data / link).symlink_to(tmp_path / "home" / target)
    (data / "c.png").symlink_to(tmp_path / "home" / "private.txt")  # no image: opens no door
    (data / "gone.png").symlink_to("nowhere.png")
    (data / "again").symlink_to(data)
    images = folder_set(data)
    assert images.names == ["a.png", "b.png", "c.png", "gone.png"]
    assert images.captions == ["of the pool", "", "", ""]
    told = capsys.readouterr().out
    assert "3 of its images" in told and "b.txt" in told and "metadata.jsonl" in told
    assert "secret" not in told


def test_snapshots_of_the_hub(tmp_path):
    """Only the links have suffixes; all lead to blobs/, texts and tables too."""
    pictures(tmp_path / "made", "0.png", "1.png")
    (tmp_path / "made" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    (tmp_path / "made" / "1.txt").write_text("a dog")
    blobs = tmp_path / "datasets--x" / "blobs"
    snapshot = tmp_path / "datasets--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "made").iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i:040x}"))
    images = folder_set(snapshot)
    assert images.names == ["0.png", "1.png"] and images.captions == ["a cat", "a dog"]
    assert images.read(0, 8).shape == (8, 8, 3)


@pytest.fixture
def deep(tmp_path):
    """A folder that goes when the test ends: pytest would nest a call for each level."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path])


def test_folders_of_any_depth(deep, monkeypatch):
    tmp_path = deep
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, "top.png")
    for _ in range(1100):  # beyond what Python nests calls
        os.mkdir("d")
        os.chdir("d")
    shutil.copy(tmp_path / "top.png", "deep.png")
    os.chdir(tmp_path)
    images = folder_set(tmp_path)
    assert len(images) == 2 and images.read(0, 8).shape == (8, 8, 3)
    owned.mark(tmp_path / "d")
    assert folder_set(tmp_path).names == ["top.png"]


ODD = b"c\xff\xe9t", b"d\nerror: forged\x1b[31m", "é".encode()


def odd_names(root):
    for name in ODD:
        pictures(root, os.fsdecode(name + b"/\xfe0.png"), os.fsdecode(name + b"/\n.png"))
        Path(root, os.fsdecode(name + b"/\xfe0.txt")).write_text("café")


def test_names_that_are_no_utf8_or_would_forge_lines(tmp_path, capsys):
    odd_names(tmp_path)
    images = folder_set(tmp_path)
    assert len(images) == 6 and len(images.classes) == 3 and images.captions.count("café") == 3
    with pytest.raises(UserError) as told:
        images.only("nope")
    for text in (capsys.readouterr().out, str(told.value)):
        assert "\x1b" not in text and not any(x.startswith("error") for x in text.split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_odd_names_through_the_command(tmp_path, locale):
    odd_names(tmp_path / "data")
    args = (*TINY, "--data", "data", "--condition", "class", "--train_steps", "2")
    command = [sys.executable, ROOT / "train.py", *args, "--save_folder", "run"]
    environment = os.environ | locale
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout and (tmp_path / "run" / "model.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8 elsewhere")
def test_a_run_in_a_folder_that_is_not_utf8(tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/lat\xe9\x1b[31m"))
    options = dict(data="toy", image_size=8, unet_dim=8, dim_mults=(1, 2), batch_size=4, seed=0)
    options |= dict(num_samples=0, save_folder=str(folder))
    for steps in (1, 2):
        trainer.train(Config(**options, train_steps=steps))
    assert checkpoint.read(folder / "model.pt")["step"] == 2
    weights = [load(folder / name).model.state_dict() for name in ("model.pt", "ema.safetensors")]
    same(*weights)
    assert "\x1b" not in "".join(capsys.readouterr())


# --- kohya's folders -----------------------------------------------------------------------------


def test_repeats_and_captions_of_kohya_s_folders(tmp_path, capsys):
    pictures(tmp_path, "img/10_sks dog/0.png", "img/10_sks dog/1.png", "img/3_a cat/0.png")
    pictures(tmp_path, "reg/1_dog/0.png")
    (tmp_path / "img" / "10_sks dog" / "1.txt").write_text("a dog on grass")
    images = folder_set(tmp_path)
    assert images.names == ["img/10_sks dog/0.png", "img/10_sks dog/1.png", "img/3_a cat/0.png"]
    assert images.repeats == [10, 10, 3]
    assert images.captions == ["sks dog", "a dog on grass", "a cat"]
    assert folder_set(tmp_path, default_caption="x").captions == ["x", "a dog on grass", "x"]
    told = capsys.readouterr().out
    assert "10_sks dog" in told and "1 images beside img/" in told
    batches = Batches(Pixels(images, 8, None), 23, seed=0)
    assert len(batches) == 23
    for epoch in range(2):
        assert np.bincount(batches.indices(epoch)).tolist() == [10, 10, 3]
    part = images.subset([2, 0])
    assert part.repeats == [3, 10]


@pytest.mark.parametrize(
    "names",
    [
        ("1_cat", "2_dog"),
        ("1_cat", "dog"),
        ("0_cat", "1_dog"),
        ("01_cat", "10_dog"),
        ("10_cat", "."),
    ],
)
def test_numbered_classes_are_no_repeats(tmp_path, names):
    pictures(tmp_path, *(f"{name}/0.png" for name in names))
    images = folder_set(tmp_path)
    assert images.repeats is None and images.texts is None


def test_repeats_count_only_where_captions_are_used(tmp_path):
    pictures(tmp_path, "10_cat/0.png", "20_dog/0.png")
    images = folder_set(tmp_path, selection=Selection(captions=False))
    assert images.repeats is None and images.classes == ["10_cat", "20_dog"]


# --- what is said of folders that mean something else ----------------------------------------------


def test_private_texts_beside_a_picture_stay_unread(tmp_path, capsys):
    """A picture opens only the texts and tables of its own name, not all that lies beside it."""
    home, data = tmp_path / "home", tmp_path / "data"
    pictures(home, "holiday.png")
    secrets = (".netrc", "id_rsa", "notes.txt", "rows.csv")
    for name in (*secrets, "holiday.txt"):
        (home / name).write_text("file_name,text\n1.png,secret" if "." in name else "secret")
    for i, name in enumerate(secrets):
        folder = data / str(i)
        folder.mkdir(parents=True)
        (folder / "1.png").symlink_to(home / "holiday.png")
        (folder / "1.txt").symlink_to(home / name)
        (folder / "metadata.csv").symlink_to(home / name)
        assert folder_set(folder).captions is None
        said = capsys.readouterr().out
        assert "secret" not in said and "1.txt" in said and "metadata.csv" in said
        (folder / "1.txt").unlink()
        (folder / "1.txt").symlink_to(home / "holiday.txt")
        assert len(folder_set(folder).captions[0]) > 0


def test_a_folder_of_two_names_is_named(tmp_path, capsys):
    pictures(tmp_path, "made/0.png")
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "made")
    assert folder_set(tmp_path / "data").classes == ["a"]
    assert f"{tmp_path / 'data' / 'b'}': was read under another name" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["", "hf:"])
def test_data_that_names_nothing(tmp_path, data):
    """As of a shell's variable that is not set: not the folder one is in."""
    pictures(tmp_path, "0.png")
    done = warm.script("train.py", "--data", data, "--dry_run", cwd=tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode in (1, 2) and "--data" in told and "Traceback" not in told


def test_folders_without_images_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="0 images: none; other files: none"):
        folder_set(tmp_path)
    (tmp_path / "z.zip").write_text("")
    with pytest.raises(UserError, match=r"other files: .zip \(1\)"):
        folder_set(tmp_path)


@pytest.mark.parametrize("names", [("20_a dog/x/0.png",), ("20_a dog/0.png", "plain/1.png")])
def test_names_like_kohya_s_that_are_not_read_so_are_named(tmp_path, names, capsys):
    pictures(tmp_path, *names)
    assert folder_set(tmp_path).repeats is None
    assert "20_a dog look like kohya's" in capsys.readouterr().out


def test_heif_by_all_its_suffixes(tmp_path):
    for suffix in ("heic", "HIF", "heif", "heics", "heifs"):
        (tmp_path / f"a.{suffix}").write_bytes(b"")
    assert len(folder_set(tmp_path)) == 5


def test_folders_deeper_than_a_path_can_say(tmp_path, capsys, monkeypatch):
    pictures(tmp_path, "0.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2200):
        os.mkdir("n")
        os.chdir("n")
    assert folder_set(tmp_path).names == ["0.png"]
    said = capsys.readouterr().out
    assert "too long" in said and len(said) < 1000
    for _ in range(2200):  # what is to be deleted has a path, too
        os.chdir("..")
        os.rmdir("n")
