"""visualize.py: what it writes, and that the pictures are those of the process."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import warm
from conftest import script
from helpers import tiny_run
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.files.atomic import read_lines
from diffusion.pictures import page, plot, views
from diffusion.pictures.grid import enlarge, strip, to_uint8
from diffusion.process.samplers import SAMPLERS, make_table
from diffusion.process.schedule import make_path
from diffusion.runtime.seeding import ImageNoise
from diffusion.sampling.load import load
from diffusion.training.trainer import train

PERCENT = ("00", "25", "50", "75", "99")
FORWARD = {f"forward_t{p}.png" for p in PERCENT} | {"forward.png", "forward.webp", "schedule.png", "table.png"}  # fmt: skip
REVERSE = {f"backward_t{p}.png" for p in PERCENT} | {
    "backward.png", "backward.webp", "backward_x0.png", "interpolate_seeds.png",
    "interpolate_images.png", "curves.png",
}  # fmt: skip


@pytest.fixture
def show(monkeypatch):
    """visualize.py's main in this process, with few tables on the page: all of them take seconds."""
    from diffusion.commands import visualize

    monkeypatch.setattr(page, "STEPS", (1,))

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, args), "--device", "cpu"])
        visualize.main()

    return main


@pytest.fixture(scope="module")
def pipeline(model):
    return load(model)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_as_a_user_calls_it(tmp_path):
    """Without arguments and without a model of one's own: the one that comes with the package."""
    done = script("visualize.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    viz = tmp_path / "results" / "viz"
    assert {p.name for p in viz.iterdir()} == FORWARD | REVERSE - {"curves.png"}
    assert done.stdout.splitlines()[-1] == "next: python visualize.py --html"


def test_a_model(model, tmp_path, show):
    show("--load_path", model, "--save_folder", tmp_path, "--html", "--num_images", 2, "--sampler", "ddim", "--steps", 10)  # fmt: skip
    viz = tmp_path / "viz"
    assert {p.name for p in viz.iterdir()} == FORWARD | REVERSE | {"index.html"}
    # the page: the runs that fit into T = 20 steps
    text = (viz / "index.html").read_text()
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    names = [run["name"] for run in data["runs"]]
    assert names == ["ddim, 10 steps", "ddpm, 20 steps", "ddim, 20 steps", "dpmpp_2m, 20 steps", "dpmpp_2m, 10 steps"]  # fmt: skip
    assert data["T"] == 20 and data["size"] == [16, 16] and len(data["forward"]["x"]) == 2
    # animations: one frame per timestep, and the last one stays
    moving = Image.open(viz / "backward.webp")
    assert moving.n_frames == 11 and Image.open(viz / "forward.webp").n_frames == 20


def test_the_pictures_are_those_of_q_sample(model, tmp_path, show, pipeline):
    show("--load_path", model, "--save_folder", tmp_path, "--num_images", 2, "--steps", 5)
    data = views.pick_images(None, pipeline.config, 4)
    eps = ImageNoise(0, range(2), (3, 16, 16))()
    for p in (0, 50, 99):
        t = round(p / 100 * 19)
        a, s = pipeline.schedule.alpha[t].float(), pipeline.schedule.sigma[t].float()
        x_t = to_uint8(a * data.images[:2] + s * eps).astype(int)
        picture = pixels(tmp_path / "viz" / f"forward_t{p:02d}.png")[2:-2, 2:]
        left = picture[:, :96].reshape(16, 6, 16, 6, 3)  # enlarged six times
        assert np.ptp(left, (1, 3)).max() == 0 and abs(left[:, 0, :, 0] - x_t[0]).max() <= 1


@pytest.mark.parametrize(
    "name, objective, last",
    [
        ("edm", "edm", (1, 80)),
        pytest.param("flow", "flow", (0, 1), marks=pytest.mark.slow),
    ],
)
def test_pictures_of_every_path(faces, tmp_path, show, name, objective, last):
    """Noise of deviation 80 can be seen as noise, forwards and backwards; plots are of the path."""
    options = tiny_run(faces, tmp_path) | dict(path=name, objective=objective, train_steps=2)
    train(Config(**options | dict(num_samples=0, save_and_sample_every=2)))
    run = tmp_path / "run"
    show("--load_path", run, "--save_folder", tmp_path, "--num_images", 1, "--steps", 4, "--html")
    viz = tmp_path / "viz"
    trained = load(run / "model.pt")
    x0 = views.pick_images(None, trained.config, 2).images[:1]
    eps = ImageNoise(0, range(1), (3, 16, 16))()
    of = lambda file: pixels(viz / f"{file}.png")[2:-2, 2:-2][::6, ::6]  # enlarged six times
    for t, alpha, sigma in ((19, *last), (0, *(float(v[0]) for v in (trained.schedule.alpha, trained.schedule.sigma)))):  # fmt: skip
        x_t = (alpha * x0 + sigma * eps) / max(1, math.hypot(alpha, sigma))
        found = of(f"forward_t{99 if t else 0:02d}")
        assert abs(found - to_uint8(x_t)[0].astype(int)).max() <= 1
    started = last[1] * eps / max(1, math.hypot(*last))  # without an image
    found = of("backward_t99")
    assert abs(found - to_uint8(started)[0].astype(int)).max() <= 1
    assert np.mean((found == 0) | (found == 255)) < 0.4  # 0.32 of a normal's are beyond 1
    text = (viz / "index.html").read_text()
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["schedule"]["path"] == name and data["schedule"]["t"] == list(range(20))
    log_snr = 2 * (trained.schedule.alpha / trained.schedule.sigma).log()
    np.testing.assert_allclose(data["schedule"]["log_snr"], log_snr.clamp(-30, 30))


def test_the_plot_of_a_schedule_is_the_paths_own(monkeypatch):
    seen = []
    monkeypatch.setattr(views, "line_plot", lambda lines, *_: seen.append(lines) or Image.new("L", (1, 1)))  # fmt: skip
    for name in ("vp", "edm", "flow"):
        path = make_path(name, 20, "v")
        views.schedule_plot(path, make_table(path, "heun", 5))
        alpha, sigma = path.alpha, path.sigma
        (image, dots), (log_snr, _) = seen[-2:]
        assert_close(image.y, alpha**2 / (alpha**2 + sigma**2), rtol=1e-12, atol=1e-12)
        assert_close(log_snr.y, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
        assert_close(dots.y[0], image.y[-1])
        assert len(dots.x) == len(dots.y) == 5
    assert_close(seen[0][0].y, make_path("vp", 20, "v").alpha_bar)


def test_the_last_picture_is_the_sample(model, tmp_path, show):
    args = ("--load_path", model, "--steps", 7, "--sampler", "ddpm", "--class_label", "bob", "--seed", 3, "--amp", "no")  # fmt: skip
    show(*args, "--save_folder", tmp_path, "--num_images", 2)
    done = warm.script("sample.py", *args, "--num_images", 2, "--batch_size", 2, "--device", "cpu",
                  "--save_folder", tmp_path / "s", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = pixels(tmp_path / "viz" / "backward_t00.png")[2:-2, 2:98][::6, ::6]
    assert abs(last - pixels(tmp_path / "s" / "images" / "000000.png")).max() <= 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_is_the_loop(pipeline, sampler):
    options = dict(seed=1, sampler=sampler, steps=6, amp="no")
    path = views.reverse(pipeline, [4, 5], **options)
    assert path.t == [*pipeline.table(sampler, 6).t.tolist(), -1.0]
    assert len(path.x) == len(path.x0) == 7
    start = ImageNoise(1, [4, 5], pipeline.shape)()
    np.testing.assert_array_equal(path.x[0], to_uint8(start))
    steps = list(pipeline.frames([4, 5], **options))
    np.testing.assert_array_equal(path.x[-1], to_uint8(steps[-1][0]))
    np.testing.assert_array_equal(path.x[3], to_uint8(steps[2][0]))
    np.testing.assert_array_equal(path.x0[3], to_uint8(steps[3][1]))


def test_slerp_keeps_the_norm_and_meets_the_ends():
    a, b = (ImageNoise(s, [0], (3, 8, 8))()[0] for s in (0, 1))
    assert_close(views.slerp(a, b, 0.0), a)
    assert_close(views.slerp(a, b, 1.0), b)
    for share in (0.2, 0.5, 0.8):
        norm = views.slerp(a / a.norm(), b / b.norm(), share).norm()
        assert_close(norm, torch.tensor(1.0), rtol=1e-5, atol=0)
    assert_close(views.slerp(a, a, 0.3), a)


def test_interpolations_end_at_the_samples(pipeline, tmp_path):
    data = views.pick_images(None, pipeline.config, 4)
    own = dict(amp="no", seed=3)
    gallery = views.Gallery(
        path=tmp_path,
        replace=False,
        pipeline=pipeline,
        data=data,
        table=pipeline.table("ddim", 10),
        count=2,
        seed=3,
        options=lambda _: own,
        conditioned=True,
    )
    rows = gallery.between_seeds()
    assert rows.shape == (2, 8, 16, 16, 3)
    for column, seed in ((0, 3), (-1, 4)):
        samples = pipeline.sample(range(2), sampler="ddim", steps=10, **own | dict(seed=seed))
        difference = rows[:, column].astype(int) - to_uint8(samples)
        assert abs(difference).max() <= 1
    rows = gallery.between_images()
    assert rows.shape == (2, 10, 16, 16, 3)
    np.testing.assert_array_equal(rows[:, 0], to_uint8(data.images[:2]))
    np.testing.assert_array_equal(rows[:, -1], to_uint8(data.images[2:]))
    # half of the steps from the image's own q_sample
    [*_, (x, _)] = pipeline.frames([0], init=data.images[:1], strength=0.5, sampler="ddim", steps=10, eps=ImageNoise(3, [0], pipeline.shape)(), **own)  # fmt: skip
    assert abs(rows[0, 1].astype(int) - to_uint8(x)[0]).max() <= 1


def test_noise_given_from_outside_is_not_reused_by_the_rows(pipeline):
    """ddpm from the image's own first noise is ddpm."""
    eps = ImageNoise(0, [0], pipeline.shape)()
    options = dict(sampler="ddpm", steps=5, amp="no")
    assert_close(pipeline.sample([0], eps=eps, **options), pipeline.sample([0], **options))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--load_path", "none.pt"), "none.pt does not exist"),
        (("--num_images", 0), "num_images is 0"),
        (("--sampler", "rk4"), "sampler 'rk4' is unknown"),
        (("--data", "nowhere"), "data .nowhere. is neither"),
        (("--class_label", "dog"), "class_label 'dog' is unknown"),
    ],
)
def test_mistakes_are_told_before_any_picture(model, tmp_path, show, args, told):
    args = args if "--load_path" in args else ("--load_path", model, *args)
    with pytest.raises(UserError, match=told):
        show(*args, "--save_folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_has_gone_is_told(model, tmp_path, show, monkeypatch, pipeline):
    def gone(*_):
        raise UserError("no images below here")

    monkeypatch.setattr(views, "open_data", gone)
    with pytest.raises(UserError, match="below here$"):
        show("--load_path", model, "--save_folder", tmp_path)
    with pytest.raises(UserError, match="below here$"):
        views.pick_images("x", pipeline.config, 2)


def test_bad_images_are_passed_over(tmp_path, pipeline, faces, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, file in enumerate(sorted(faces.rglob("*.png"))[:3]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    for i in range(5):
        (folder / f"bad{i}.png").write_bytes(b"no image")
    picked = views.pick_images(str(folder), pipeline.config, 8)
    assert sorted(picked.names) == ["0.png", "1.png", "2.png"] and picked.images.shape == (3, 3, 16, 16)  # fmt: skip


# --- plots ---------------------------------------------------------------------------------------


def test_ticks_are_round():
    assert plot.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plot.ticks(-3.2, 4.1) == pytest.approx([-2, 0, 2, 4])
    assert plot.ticks(1e5, 9e5) == pytest.approx([2e5, 4e5, 6e5, 8e5])
    marks = plot.ticks(1, 3, log=True)
    assert marks == pytest.approx([10, 20, 50, 100, 200, 500, 1000])
    assert plot.ticks(0, 6, log=True) == pytest.approx([10.0**n for n in range(7)])
    assert plot.ticks(np.log10(30), np.log10(40), log=True) == pytest.approx(
        [30, 32, 34, 36, 38, 40]
    )


def colours(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def where(picture, colour: str) -> np.ndarray:
    """(n, 2) rows and columns of the pixels of this colour."""
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(abs(colours(picture) - target).max(-1) < 60)


def test_a_line_is_where_its_numbers_are():
    picture = plot.line_plot([plot.Line([0, 10], [0, 5])], "title", "x")
    found = where(picture, plot.COLOURS[0])
    left, right = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
    assert left[0] > 300 and right[0] < 80 and left[1] < 120 and right[1] > 560
    middle = found[abs(found[:, 1] - (left[1] + right[1]) / 2) < 1]
    assert abs(middle[:, 0].mean() - (left[0] + right[0]) / 2) < 3


def test_plots_take_what_runs_produce():
    nan = float("nan")
    plot.line_plot([plot.Line([1, 2, 3], [nan, 1, float("inf")], "a")], "t", "x")
    plot.line_plot([plot.Line([5], [0.3], "one point")], "t", "x", log_x=True, log_y=True)
    plot.line_plot([plot.Line([1], [nan], "none"), plot.Line([1], [1e30], "one")], "t", "x")
    plot.line_plot([plot.Line([0, 1, 2], [0, 1, 2], "zero on a log axis")], "t", "x", log_x=True)
    with pytest.raises(ValueError, match="no finite point"):
        plot.line_plot([plot.Line([1], [nan])], "t", "x")


def test_curves_show_loss_and_distances(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert views.curves(file) is None
    lines = [{"step": 10 * i, "loss": 1 / (i + 1)} for i in range(5)]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert views.curves(file).size == (640, 400)
    lines += [{"step": 40, "fid": 3.0, "fid_seconds": 1.0}, {"step": 50, "loss": None}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert views.curves(file).size == (640, 800)


def test_curves_of_a_killed_run_and_of_other_counts(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "x": None, "fid_seconds": 1.0},
             {"step": 2, "fid": 3.0, "fid_num_images": 10, "fid_seconds": 1.0},
             {"step": 3, "fid": 1.0, "fid_num_images": 500, "fid_seconds": 1.0}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)) + '\n\n{"step": 4, "lo')
    picture = views.curves(file)
    assert picture.size == (640, 800)
    fid_plot = picture.crop((0, 400, 640, 800))
    assert len(where(fid_plot, plot.COLOURS[0])) and len(where(fid_plot, plot.COLOURS[1]))


def test_copies_are_a_curve_of_their_own(tmp_path, monkeypatch):
    drawn = {}

    def spy(lines, title, *rest, **options):
        drawn[title] = [line.y for line in lines]
        return plot.line_plot(lines, title, *rest, **options)

    monkeypatch.setattr(views, "line_plot", spy)
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "pixels": 3.0, "fid_num_images": 10, "copies": i / 10, "fid_seconds": 1.0}
             for i in (1, 2)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    views.curves(file)
    assert drawn == {
        plot.distance_title("pixels"): [(3.0, 3.0)],
        "Fraction of copies": [(0.1, 0.2)],
    }


ODD = [None, 0, -1, True, "x", [], {}, [[1]], 1e300, -3e38, 10**30, 10**400, 5e-324]
RAW = ["1e400", "-Infinity", "NaN", "1" * 5000, '"\\ud800"', "[" * 3000]


@pytest.mark.parametrize(
    "name", ["step", "loss", "fid", "fid_seconds", "fid_num_images", "a\n\x1b[31m"]
)
def test_curves_of_any_log(tmp_path, name):
    """Numbers are drawn, and whatever else a line says is left out."""
    file = tmp_path / "metrics.jsonl"
    good = {"step": 1, "loss": 0.5, "fid": 3.0, "fid_seconds": 1.0, "fid_num_images": 10}
    values = [*map(json.dumps, ODD[:: 1 if name == "loss" else 4]), *RAW]
    bad = [json.dumps(good | {name: "?"}).replace('"?"', value) for value in values]
    for lines in (["", "[1]", "3", "null", '"x"', "{}", *bad], *([line] for line in bad)):
        file.write_text("\n".join(lines))
        views.curves(file)
        assert all(
            type(v) in (int, float, type(None)) for x in read_lines(file) for v in x.values()
        )
    many = {f"k{i}": 1.0 for i in range(5000)}
    file.write_text(json.dumps({"step": 1, "fid_seconds": 1.0} | many))
    assert views.curves(file).height <= 8 * 400


def test_a_log_that_is_a_pipe_is_named(model, tmp_path, show):
    folder = shutil.copytree(model.parent, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        show(
            "--load_path",
            folder / "model.pt",
            "--data",
            "toy",
            "--save_folder",
            tmp_path,
            "--num_images",
            1,
        )


def test_a_model_does_not_decide_what_is_opened(model, tmp_path, show, capsys, monkeypatch):
    """What a run made here was trained on is shown; of a model from elsewhere, its own samples."""

    def opened(*given):
        seen.append(given[0])
        raise UserError("opened")

    seen = []
    monkeypatch.setattr(views, "open_data", opened)
    options = ("--save_folder", tmp_path, "--num_images", 1, "--steps", 2, "--html")
    with pytest.raises(UserError, match="opened"):
        show("--load_path", model, *options)
    private = seen.pop()
    copy = shutil.copytree(model.parent, tmp_path / "copy")  # as an archive's would be
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(model, alone)
    for folder in (copy, alone):
        show("--load_path", folder / "model.pt", *options)
        assert seen == [] and os.path.basename(private) in capsys.readouterr().out
        monkeypatch.setattr(views.Gallery, "draw", lambda *_: None)  # once is enough
    page = (tmp_path / "viz" / "index.html").read_text()
    assert "sample 0" in page and str(tmp_path) not in page
    with pytest.raises(UserError, match="opened"):
        show("--load_path", copy / "model.pt", "--data", "faces", *options)
    assert seen == ["faces"]


def test_a_set_is_fetched_only_when_asked_for(model, tmp_path, show, monkeypatch):
    folder = shutil.copytree(model.parent, tmp_path / "run")
    (folder / ".lock").write_text(str(folder.stat().st_ino))  # as if it were made here
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    options = ("--load_path", folder / "model.pt", "--num_images", 1, "--steps", 2)
    for name in ("hf:me/private", "cifar10", "https://example.org/x.zip", "no/such/folder"):
        (folder / "config.json").write_text(json.dumps(config | {"data": name}))
        monkeypatch.setattr(views, "open_data", lambda *_: pytest.fail("it is opened"))
        monkeypatch.setattr(views.Gallery, "draw", lambda *_: None)
        show(*options, "--overwrite")


def test_long_processes_keep_few_frames(pipeline):
    times = [float(t) for t in range(999, -1, -1)]
    kept = views.choose_frames(times, 1000)
    assert len(kept) <= views.MAX_FRAMES + 5 and {0, 999} <= set(kept) and kept == sorted(kept)
    for p in views.PERCENT:
        assert 999 - round(p / 100 * 999) in kept


def test_one_step_and_one_image(model, tmp_path, show):
    show("--load_path", model, "--save_folder", tmp_path, "--num_images", 1, "--steps", 1)
    moving = Image.open(tmp_path / "viz" / "backward.webp")
    assert moving.width >= plot.font(15).getlength("ddim, 1 steps   t = 19")


def test_only_what_was_written_is_listed(tmp_path, show, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "viz").mkdir()
    (tmp_path / "viz" / "curves.png").write_text("another run's")
    show("--save_folder", tmp_path)
    assert "curves.png" not in capsys.readouterr().out


def test_strip_and_enlarge():
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    large = enlarge(rows)
    assert large.shape == (2, 3, 96, 96, 3)
    np.testing.assert_array_equal(large[..., ::6, ::6, :], rows)
    picture = colours(strip(rows, ["a", "b", "c"], "heading"))
    assert picture.shape == (2 * 100 + 4 + 52, 3 * 100 + 4, 3)
    np.testing.assert_array_equal(picture[56:152, 4:100], large[0, 0])
    np.testing.assert_array_equal(picture[156:252, 204:300], large[1, 2])
