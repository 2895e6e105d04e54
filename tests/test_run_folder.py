"""A run's folder: nothing in it is deleted or replaced without proof that a run of ours wrote it."""

import json

import pytest
import warm
from PIL import Image

from diffusion.files import owned
from diffusion.files.atomic import locked

QUICK = ["--preset", "none", "--image_size", 16, "--unet_dim", 8, "--dim_mults", "1,2", "--heads", 2, "--batch_size", 4,
         "--time_steps", 10, "--save_and_sample_every", 2, "--log_every", 2, "--num_samples", 1, "--sample_steps", 2,
         "--device", "cpu", "--amp", "no"]  # fmt: skip


@pytest.fixture
def run(faces, tmp_path):
    """Call train.py on a few steps in tmp_path/run."""

    def call(*options, steps=2, folder="run"):
        return warm.script("train.py", *QUICK, "--data", faces, "--train_steps", steps, "--save_folder", folder,
                           "--cache_dir", tmp_path / "cache", *options, cwd=tmp_path)  # fmt: skip

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
