"""A run's folder: nothing in it is deleted or replaced without proof that a run of ours wrote it."""

import json
import shutil

import numpy as np
import pytest
import warm
from PIL import Image

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import output, owned
from diffusion.files.atomic import locked
from diffusion.pictures.grid import save_png
from diffusion.training.trainer import train

QUICK = ["--preset", "none", "--image_size", 16, "--unet_dim", 8, "--dim_mults", "1,2", "--heads", 2, "--batch_size", 4,
         "--time_steps", 10, "--save_and_sample_every", 2, "--log_every", 2, "--num_samples", 1, "--sample_steps", 2,
         "--device", "cpu", "--amp", "no"]  # fmt: skip


@pytest.fixture
def run(faces, tmp_path):
    """Call train.py on a few steps in tmp_path/run."""

    def call(*options, steps=2, folder="run", env=None):
        return warm.script("train.py", *QUICK, "--data", faces, "--train_steps", steps, "--save_folder", folder,
                           "--cache_dir", tmp_path / "cache", *options, cwd=tmp_path, env=env)  # fmt: skip

    return call


def contents(folder):
    """{relative path: bytes} of the files below a folder, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


FOREIGN = {
    "a model of transformers": {"config.json": b'{"architectures": ["CLIP"], "seed": 0}', "vocab.json": b"{}"},
    "a list for a config": {"config.json": b"[1, 2]"},
    "a data set": {"metadata.json": b'{"name": "faces"}', "samples/a.png": b"a"},
    "another program's checkpoints": {"checkpoints/step_00000100.pt": b"PK", "checkpoints/best.pt": b"PK"},
    "another program's model": {"model.pt": b"PK\x03\x04 not ours"},
    "somebody's weights": {"ema.safetensors": b"weights"},
    "somebody's log": {"metrics.jsonl": b'{"step": 5, "loss": 1}\n'},
    "another program's events": {"tensorboard/events.out.tfevents.1.host": b"events"},
    "pictures of another run": {"samples/step_00000300.png": b"png"},
}  # fmt: skip


@pytest.mark.parametrize("option", ["", "--overwrite"])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_is_somebody_elses_is_not_touched(run, tmp_path, files, option):
    for name, content in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    done = run(*[option] if option else [])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(name in done.stderr for name in files) and "--save_folder" in done.stderr
    assert contents(tmp_path / "run") == files


def test_folders_with_other_things_in_them_are_used(run, tmp_path):
    """What a run neither replaces nor deletes may lie beside and inside its folders."""
    mine = {
        "samples/holiday.png": b"1",
        "checkpoints/best.pt": b"2",
        "notes.txt": b"3",
        ".draft.tmp": b"4",
    }
    mine |= {"checkpoints/step_best.pt": b"5", "tensorboard/readme": b"6", ".lock": b"mine"}
    mine |= {"model.pt.tmp": b"7", ".config.json": b"8"}
    for name, content in mine.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    for options, steps in (([], 2), ([], 4), (["--overwrite", "--learning_rate", 0.002], 2)):
        done = run(*options, steps=steps)
        assert done.returncode == 0, done.stderr
        assert ("from step 2" in done.stdout) == (steps == 4)
        assert {name: (tmp_path / "run" / name).read_bytes() for name in mine} == mine
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["best.pt", "step_00000002.pt", "step_best.pt"]


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_run_whose_config_is_lost_resumes(run, tmp_path, harm):
    """A checkpoint of ours is proof, too: of a run that was copied without its config.json."""
    assert run().returncode == 0
    config = tmp_path / "run" / "config.json"
    config.unlink() if harm == "missing" else config.write_bytes(b"\0" * 100)
    done = run(steps=4)
    assert done.returncode == 0 and "from step 2" in done.stdout
    assert json.loads(config.read_text())["train_steps"] == 4
    config.unlink()
    assert run("--overwrite", "--seed", 1).returncode == 0
    assert json.loads(config.read_text())["seed"] == 1


def test_a_run_killed_at_its_start_begins_again(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.tmp").write_text("{")
    assert run().returncode == 0
    assert not (tmp_path / "run" / ".config.json.tmp").exists()


def test_folders_that_are_links(run, tmp_path):
    """Checkpoints on another disk: the link stays, and so does what else lies there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "samples", "tensorboard"):
        (disk / name).mkdir()
        (disk / name / "keep.txt").write_text(name)
        (tmp_path / "run" / name).symlink_to(disk / name)
    assert run(steps=4).returncode == 0
    done = run("--overwrite", "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["keep.txt", "step_00000002.pt"]  # fmt: skip
    for name in ("checkpoints", "samples", "tensorboard"):
        assert (tmp_path / "run" / name).is_symlink() and (
            disk / name / "keep.txt"
        ).read_text() == name


def test_what_cannot_be_written_is_said_before_training(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tmp_path / "gone")
    done = run()
    assert done.returncode == 1 and "checkpoints" in done.stderr and "gone" in done.stderr
    (folder / "checkpoints").unlink()
    (folder / "samples").write_text("a file")
    done = run()
    assert done.returncode == 1 and "samples" in done.stderr
    (folder / "samples").unlink()
    (folder / "model.pt").mkdir()
    done = run()
    assert done.returncode == 1 and "model.pt" in done.stderr
    assert contents(folder) == {}


def test_what_is_proof(tmp_path):
    assert not owned.is_ours(tmp_path) and not owned.is_run(tmp_path)
    owned.mark(tmp_path / "images")
    owned.mark(tmp_path / "images")
    assert owned.is_ours(tmp_path / "images") and not owned.is_run(tmp_path / "images")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    assert not any(owned.is_our_picture(tmp_path / name) for name in ("a.png", "b.png", "c.png"))


def test_proof_is_no_mention(tmp_path):
    """A page, a film and a table of ours are told from what only names the program."""
    from diffusion.files import output

    page = f'<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="{owned.SOFTWARE}">\n'
    table = json.dumps({"software": owned.SOFTWARE, "rows": []}, indent=2)
    ours = {"index.html": page, "quality.json": table, "quality_2.json": table}
    mine = {"notes.md": f"written with {owned.SOFTWARE}", "page.html": page, "my.json": table}
    mine |= {"a/index.html": f"<p>{page}</p>", "b/index.html": f"<!doctype html>\n{owned.SOFTWARE}",
             "a/quality.json": json.dumps({"notes": owned.SOFTWARE}, indent=2), "a/quality_2.json": f"x{table}"}  # fmt: skip
    for name, text in (ours | mine).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {name for name in ours | mine if output.is_ours(tmp_path / name)} == set(ours)


def test_visualize_keeps_notes(tmp_path):
    args = ("--data", "toy", "--num_images", 1, "--html", "--device", "cpu")
    assert warm.script("visualize.py", *args, cwd=tmp_path).returncode == 0
    done = warm.script("visualize.py", *args, "--overwrite", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "results" / "viz_2").exists()
    notes = tmp_path / "results" / "viz" / "notes.md"
    notes.write_text(f"made with {owned.SOFTWARE}")
    done = warm.script("visualize.py", *args, "--overwrite", cwd=tmp_path)
    assert done.returncode == 0 and notes.exists()
    assert (tmp_path / "results" / "viz_2" / "index.html").exists()


def test_a_lock_is_held_once(tmp_path):
    """On a file, which is created, and on a folder."""
    for path in (tmp_path / "file", tmp_path):
        with locked(path) as first, locked(path, wait=False) as second:
            assert first is True and second is False
        with locked(path, wait=False) as again:
            assert again is True


# --- links that somebody else has laid -------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    """A file of the user's that nothing may write to."""
    file = tmp_path / "mine.txt"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine" and not (tmp_path / "gone").exists()


def lay(folder, names, target) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)


LOGS = [
    "metrics.jsonl",
    "metadata.json",
    "config.json",
    "tensorboard/events.out.tfevents.9999999999.x",
]
RESULTS = [
    "model.pt",
    "ema.safetensors",
    "best.safetensors",
    "samples/step_00000004.png",
    "checkpoints/step_00000004.pt",
    ".model.pt.tmp",
    "samples/.step_00000004.png.tmp",
    ".overwritten",
]


def test_links_in_a_runs_folder_are_not_written_through(run, tmp_path, mine):
    """They are replaced by the run's own files, and those that are not there yet stay out of it."""
    assert run().returncode == 0
    for names, target in ((LOGS[:2], mine), (RESULTS, mine), (LOGS, tmp_path / "gone")):
        lay(tmp_path / "run", names, target)
        done = run(steps=4)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        done = run("--overwrite")
        assert done.returncode == 0, done.stderr
    lay(tmp_path / "run", [".lock"], mine)
    done = run(steps=4)
    assert done.returncode == 1 and ".lock" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_of_another_run_is_not_written_to(run, tmp_path):
    """A link into it would replace its checkpoints and pictures."""
    assert run(folder="other").returncode == 0
    before = contents(tmp_path / "other")
    for name in ("checkpoints", "samples", "tensorboard"):
        lay(tmp_path / "run", [name], tmp_path / "other" / name)
        for options in ((), ("--overwrite",)):
            done = run("--seed", 1, *options)
            assert done.returncode == 1 and f"run/{name}" in done.stderr
            (tmp_path / "run" / "config.json").write_bytes(
                (tmp_path / "other" / "config.json").read_bytes()
            )
        (tmp_path / "run" / name).unlink()
    assert contents(tmp_path / "other") == before


def test_overwrite_deletes_nothing_behind_links_of_somebody_elses_run(run, tmp_path):
    assert run().returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "got")
    precious = tmp_path / "pictures" / "step_00000002.png"
    precious.parent.mkdir()
    precious.write_text("precious")
    shutil.rmtree(tmp_path / "got" / "samples")
    (tmp_path / "got" / "samples").symlink_to(precious.parent)
    done = run("--overwrite", folder="got")
    assert done.returncode == 1 and "got/samples" in done.stderr, done.stderr
    assert contents(precious.parent) == {"step_00000002.png": b"precious"}


@pytest.mark.parametrize("name", ["ema.safetensors", "best.safetensors", "adapter.safetensors"])
def test_shared_weights_alone_are_not_replaced(run, tmp_path, name):
    """Somebody's download, with the config.json that belongs to it."""
    assert run(folder="other").returncode == 0
    (tmp_path / "run").mkdir()
    for theirs, ours in (("ema.safetensors", name), ("config.json", "config.json")):
        (tmp_path / "run" / ours).write_bytes((tmp_path / "other" / theirs).read_bytes())
    before = contents(tmp_path / "run")
    done = run()
    assert done.returncode == 1 and name in done.stderr and "--save_folder" in done.stderr
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["images", "viz"])
def test_overwrite_replaces_no_pictures_behind_a_link(tmp_path, name):
    folder = tmp_path / "out" / name
    with output.output_folder(tmp_path / "mine", overwrite=False) as mine:
        save_png(np.zeros((8, 8, 3), np.uint8), mine / "000000.png")
    before = contents(tmp_path / "mine")
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "mine")
    open_ = output.output_folder if name == "viz" else lambda *a: output.reserve(a[0], 1, a[1])
    with pytest.raises(UserError, match=f"out/{name}"), open_(folder, True):
        pass
    with open_(folder, False):
        pass
    assert contents(tmp_path / "mine") == before


SAMPLE = ["--num_images", 2, "--steps", 2, "--device", "cpu", "--overwrite"]


@pytest.mark.parametrize("target", ["mine.txt", "gone"])
def test_links_among_pictures_are_not_written_through(tmp_path, model, mine, target):
    def sampled():
        done = warm.script(
            "sample.py", "--load_path", model, *SAMPLE, "--save_folder", "out", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr

    lay(tmp_path / "out", [".images.diffusion"], tmp_path / target)
    sampled()
    names = ["images/000000.png", "images/.000001.png.tmp", "grid.png", ".images_9_11"]
    lay(tmp_path / "out", names, tmp_path / target)
    sampled()
    assert (tmp_path / "out" / ".images_9_11").is_symlink()  # a reservation that is none


@pytest.mark.parametrize("target", ["mine.txt", "gone"])
def test_links_in_a_page_are_not_written_through(tmp_path, mine, target):
    args = ("--data", "toy", "--num_images", 1, "--html", "--device", "cpu", "--overwrite")
    lay(tmp_path / "results", [".viz.diffusion"], tmp_path / target)
    for _ in range(2):
        assert warm.script("visualize.py", *args, cwd=tmp_path).returncode == 0
        lay(
            tmp_path / "results" / "viz",
            ["index.html", "schedule.png", ".table.png.tmp"],
            tmp_path / target,
        )


# --- --overwrite in a command that is started again ------------------------------------------------


@pytest.mark.parametrize("launch", [
    {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
    {"TORCHELASTIC_ERROR_FILE": "/tmp/e_1/none_a/attempt_1/0/error.json", "TORCHELASTIC_RESTART_COUNT": "1"},
])  # fmt: skip
def test_overwrite_is_done_by_the_restarted_command(run, tmp_path, launch):
    """Killed before it deleted the old run, a command must not take the old run for its own."""
    old = {"SLURM_JOB_ID": "6", "TORCHELASTIC_ERROR_FILE": "/tmp/e_0/none_a/attempt_0/0/error.json"}
    assert run("--overwrite", env={k: v for k, v in old.items() if k in launch}).returncode == 0
    new = ("--overwrite", "--seed", 1)
    assert run(*new, env=launch).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1
    done = run(*new, steps=4, env=launch)
    assert done.returncode == 0 and "from step 2" in done.stdout


@pytest.mark.parametrize("harm", [None, "config.json"])
def test_overwrite_deletes_no_checkpoints_behind_a_link(run, tmp_path, harm):
    """Of a run that came from elsewhere, with its config.json or without one."""
    assert run().returncode == 0
    theirs = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "theirs")
    before = contents(theirs)
    got = shutil.copytree(tmp_path / "run", tmp_path / "got")
    shutil.rmtree(got / "checkpoints")
    (got / "checkpoints").symlink_to(theirs)
    if harm:
        (got / harm).unlink()
    done = run("--overwrite", folder="got")
    assert done.returncode == 1 and "got/checkpoints" in done.stderr, done.stderr
    assert contents(theirs) == before


def test_overwrite_keeps_what_the_new_run_begins_with(run, tmp_path):
    assert run().returncode == 0
    before = contents(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for option in (newest, tmp_path / "run" / "model.pt"):
        done = run("--overwrite", "--load_path", option)
        assert done.returncode == 1 and "--load_path" in done.stderr, done.stderr
    config = dict(mode="latent", vae=str(tmp_path / "run"), data=str(tmp_path), condition="none")
    with pytest.raises(UserError, match="--vae"):
        train(Config(**config, save_folder=str(tmp_path / "run"), overwrite=True))
    assert contents(tmp_path / "run") == before
