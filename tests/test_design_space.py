"""Paths, objectives and their presets at the level of the commands: trained, resumed, sampled.

The mathematics of the rows is in test_process.py, that of the solvers in test_samplers.py.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny_sd
import torch
import warm
from helpers import flags, same_runs, tiny_run, wait_for_step
from PIL import Image
from torch.testing import assert_close

from diffusion import UserError, load
from diffusion.commands import sample, train
from diffusion.config import Config
from diffusion.files import checkpoint, sd_export
from diffusion.process.loop import sample as run_table
from diffusion.process.objective import Denoiser, training_coefficients, training_loss
from diffusion.process.samplers import make_table
from diffusion.process.schedule import make_path, spread, timesteps
from diffusion.sampling.load import path_of
from diffusion.training.finetune_config import Base, resolve_config
from diffusion.training.steps import draw, loss_coefficients
from diffusion.training.trainer import train as run

GRID = [
    (path, objective)
    for path in ("vp", "edm", "flow")
    for objective in ("eps", "x0", "v", "flow", "edm")
]
NEW = (
    "path sigma_min sigma_max sigma_data noise_dist noise_mean noise_std noise_shift loss_space t_eps"
).split()


def parse(text: str) -> Config:
    return train.parse(text.split())[0]


# --- presets and options --------------------------------------------------------------------------


def test_presets_have_the_papers_values():
    edm = parse("--preset edm --data some/folder")
    path = path_of(edm)
    assert (edm.path, edm.objective, edm.loss, edm.sampler) == ("edm", "edm", "l2", "heun")
    assert_close(path.sigma[[0, -1]], torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert path.sigma_data == 0.5
    # EDM: ln sigma ~ N(-1.2, 1.2^2); the quantiles of a normal distribution
    u = torch.tensor([0.158655253931457, 0.5, 0.841344746068543], dtype=torch.float64)
    alpha, sigma = path.at(path.quantile(u))
    assert_close(sigma.log(), torch.tensor([-2.4, -1.2, 0.0], dtype=torch.float64))
    # JiT: its time, 1 at the data, is the sigmoid of N(-0.8, 0.8^2); v from x0, sigma at least 0.05
    jit = parse("--preset jit --data some/folder")
    assert (jit.objective, jit.loss_space, jit.t_eps, jit.loss) == ("x0", "flow", 0.05, "l2")
    path = path_of(jit)
    alpha, sigma = path.at(path.quantile(u))
    assert_close(alpha, torch.sigmoid(torch.tensor([0.0, -0.8, -1.6], dtype=torch.float64)))
    t = path.nearest_t(torch.tensor([0.01, 0.3], dtype=torch.float64).logit().neg())
    weight = loss_coefficients(jit, path, t)[6]
    assert_close(weight, torch.tensor([1 / 0.05**2, 1 / 0.3**2]), rtol=1e-5, atol=0)
    # SD3: logit-normal(0, 1), the velocity
    path = path_of(flow := parse("--preset flow --data some/folder"))
    alpha, sigma = path.at(path.quantile(u))
    assert_close(sigma, torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)))
    assert (flow.objective, flow.loss, flow.loss_space) == ("flow", "l2", None)
    # DDPM: betas linear from 1e-4 to 0.02, eps, its simple loss, ancestral sampling
    ddpm = parse("--preset ddpm --data some/folder")
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert_close(path_of(ddpm).alpha ** 2, (1 - beta).cumprod(0))
    assert (ddpm.objective, ddpm.loss, ddpm.sampler) == ("eps", "l2", "ddpm")


def test_a_process_goes_with_the_sizes_of_any_data():
    toy = parse("")
    made = parse("--preset edm")
    assert made.path == "edm" and made.loss == "l2"
    for name in ("data", "image_size", "unet_dim", "dim_mults", "train_steps"):
        assert getattr(made, name) == getattr(toy, name)
    assert parse("--preset edm --data cifar10").unet_dim == parse("--data cifar10").unet_dim
    assert parse("--preset edm --data some/folder").image_size == Config().image_size
    cats = parse("--preset afhq_cat32,flow")
    assert (cats.unet_dim, cats.time_steps, cats.path) == (16, 50, "flow")
    assert parse("--preset none,flow").image_size == Config().image_size != toy.image_size
    assert parse("--preset edm --sampler ddim --noise_mean -0.4").noise_mean == -0.4
    with pytest.raises(UserError, match="'edmm'.*edm"):
        parse("--preset toy,edmm")


def test_a_configuration_from_before_the_paths_is_read():
    stored = {k: v for k, v in json.loads(Config().to_json()).items() if k not in NEW}
    assert Config.from_dict(stored) == Config()
    assert path_of(Config.from_dict(stored)).quantile is None


@pytest.mark.parametrize("text, named", [
    ("--path vp --sigma_min 1", "--sigma_min.*--path edm"),
    ("--path flow --sigma_data 1", "--sigma_data.*--objective edm"),
    ("--path edm --schedule linear", "--schedule.*--path vp"),
    ("--path flow --zero_snr", "--zero_snr.*--path vp"),
    ("--noise_mean 1", "--noise_mean.*--noise_dist"),
    ("--t_eps 0.1", "--t_eps.*--loss_space"),
    ("--loss_space x0 --min_snr_gamma 5", "--min_snr_gamma"),
    ("--loss_space x0 --loss huber", "--loss l1 or l2"),
    ("--mode latent --condition text --sd_path X --path flow --objective eps --loss huber", "--loss l1 or l2"),
    ("--mode latent --condition text --sd_path X --path edm --objective eps --loss l2 --min_snr_gamma 5",
     "--min_snr_gamma"),
    ("--mode latent --condition text --sd_path X --objective flow", "--path flow"),
    ("--path edm --sigma_min 90", "sigma_min is 90.0.*80"),
    ("--noise_std 0 --noise_dist lognormal", "noise_std is 0"),
    ("--path ve", "edm, flow"),
])  # fmt: skip
def test_training_refuses_what_would_do_nothing(text, named):
    with pytest.raises(UserError, match=named):
        config, given, _ = train.parse([*text.split(), "--preset", "none"])
        config.check_use(given)


@pytest.mark.parametrize("text, named", [
    ("--shift 3", "--shift.*--spacing flow"), ("--spacing flow --shift 0", "shift is 0"), ("--churn -1", "churn is -1"),
])  # fmt: skip
def test_sampling_refuses_what_would_do_nothing(text, named):
    with pytest.raises(UserError, match=named):
        sample.parse(text.split())


def test_an_adapter_keeps_the_process_of_its_base():
    base = Config(path="edm", objective="edm", sigma_max=40.0, sigma_data=1.0, noise_dist="lognormal",
                  noise_mean=-0.4, noise_std=1.5, loss_space="x0", t_eps=0.1, loss="l2")  # fmt: skip
    asked = Config(load_path="x.pt", adapter="lora", data="some/folder")
    found = resolve_config(asked, set(), Base({}, base, {}))
    assert {n: getattr(found, n) for n in NEW} == {n: getattr(base, n) for n in NEW}
    with pytest.raises(UserError, match="--path flow .it has edm."):
        resolve_config(dataclasses.replace(asked, path="flow"), {"path"}, Base({}, base, {}))


# --- what the network is given --------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_inputs_have_unit_variance_on_the_edm_path(sigma_data):
    """At every level, in the loss and in sampling, and so do the targets of EDM's objective."""
    path = make_path("edm", 1000, "edm", sigma_data=sigma_data)
    g = torch.Generator().manual_seed(0)
    x0 = sigma_data * torch.randn(7, 3, 64, 64, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    seen = []

    def network(x, t, cond=None):
        seen.append(x)
        return torch.zeros_like(x)

    levels = training_coefficients(path, "edm", torch.linspace(0, 999, 7))
    losses = training_loss(network, levels, x0, eps)
    assert_close(seen[0].var((1, 2, 3)), torch.ones(7), rtol=0.05, atol=0)
    assert_close(losses, torch.ones(7), rtol=0.05, atol=0)  # the variance of the target
    seen.clear()
    start = 80 * torch.randn(1, 3, 64, 64, generator=g)
    run_table(Denoiser(network, path, "edm"), start, make_table(path, "ddim", 9), clip=False)
    assert len(seen) == 9
    assert all(abs(x.std() - 1) < 0.05 or x.std() < 1 for x in seen)  # x0 = c_skip x: it shrinks


@pytest.mark.parametrize("objective", ["eps", "edm", "flow"])
@pytest.mark.parametrize("T", [2, 3])
def test_a_path_of_few_timesteps_is_finite_or_refused(T, objective):
    path = make_path("flow", T, objective)
    assert path.alpha[0] > path.alpha[1]
    with pytest.raises(ValueError, match="different timesteps"):
        timesteps(make_path("flow", 2, "flow"), 5, "logsnr")
    for spacing in ("trailing", "linspace", "flow"):
        table = make_table(path, "dpmpp_2m", 5, spacing=spacing)
        assert table.to_x.isfinite().all()


def test_extreme_distributions_stay_on_the_path():
    for std, shift in ((0.01, 1.0), (10.0, 1.0), (10.0, 100.0)):
        for name, objective in (("vp", "v"), ("edm", "edm"), ("flow", "eps")):
            path = spread(make_path(name, 50, objective), "lognormal", 0.0, std, shift)
            t = path.sample_t(1000, torch.Generator().manual_seed(0))
            assert t.min() >= 0 and t.max() <= 49
            assert training_coefficients(path, objective, t).isfinite().all()


# --- Stable Diffusion as a flow -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> str:
    tiny_sd.save_folder(folder := tmp_path_factory.mktemp("sd") / "sd")
    return str(folder)


def last_time() -> float:
    """Where a flow meets the last level of Stable Diffusion 1.x: 0.936, from its betas."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    alpha_bar = float((1 - root**2).prod())
    return (1 - alpha_bar) ** 0.5 / ((1 - alpha_bar) ** 0.5 + alpha_bar**0.5)


def as_path(pipeline, name: str):
    """The pipeline of the same network on another path, as that of a run of --path."""
    config = dataclasses.replace(pipeline.config, path=name)
    return dataclasses.replace(
        pipeline, config=config, schedule=path_of(config, pipeline.schedule), scheduler={}
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, sampler", [("flow", "ddim"), ("edm", "dpmpp_2m_sde")])
def test_stable_diffusion_as_a_flow_makes_the_same_pictures(tmp_path, name, sampler, prediction):
    """At equal log-SNR both are one process, up to a factor that the start noise has, too."""
    tiny_sd.save_folder(tmp_path / "sd", prediction)
    vp = dataclasses.replace(load(tmp_path / "sd"), scheduler={})  # which ends a step early
    other = as_path(vp, name)
    options = dict(prompts=["a cat"], steps=5, spacing="logsnr", sampler=sampler, amp="no")
    pictures = [p.sample([3], guidance_scale=3.0, **options) for p in (vp, other)]
    assert_close(*pictures, rtol=0, atol=1e-4)
    assert float(pictures[0].std()) > 0.1
    alpha, sigma = other.schedule.at(torch.tensor([999.0]))
    assert_close(float(sigma / (alpha + sigma)), last_time(), rtol=1e-9, atol=0)
    assert abs(last_time() - 0.936) < 5e-5


def test_the_loss_of_stable_diffusion_as_a_flow_is_the_velocitys(sd):
    """Diff2Flow (arXiv:2506.02221): |v - (eps - x0)|^2, of the v that a predicted eps makes."""
    base = load(sd).schedule
    c = Config(mode="latent", condition="text", sd_path=sd, path="flow", objective="eps", loss="l2", batch_size=64)  # fmt: skip
    path = path_of(c, base)
    drawn = draw(c, path, (4, 8, 8), 0, torch.device("cpu"), 0)
    alpha, u = drawn.levels[:2, :, None, None, None]
    assert float(u.max()) <= last_time() + 1e-6 and float(u.min()) > 0.02
    assert_close(alpha, 1 - u)
    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = (1 - u) * x0 + u * drawn.eps
    given = []

    def network(x, t, cond):
        given.extend([x, t])
        return torch.tanh(x)

    found = training_loss(network, drawn.levels, x0, drawn.eps)
    scale = ((1 - u) ** 2 + u**2).rsqrt()
    assert_close(given[0], scale * x)
    # the base's time, of the same ratio of signal and noise
    ratio = base.sigma / base.alpha
    low, high = (ratio[given[1].double().add(d).round().long().clamp(0, 999)] for d in (-1, 1))
    assert ((low <= (u / alpha).flatten()) & ((u / alpha).flatten() <= high)).all()
    eps = torch.tanh(scale * x)
    v = eps - (x - u * eps) / (1 - u)
    expected = (v - (drawn.eps - x0)).square().mean((1, 2, 3))
    assert_close(found, expected, rtol=2e-3, atol=1e-3)


# --- slow: the commands ---------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch):
    """A script's main in this process."""
    from diffusion.commands import visualize
    from diffusion.evaluation import __main__ as evaluation

    modules = {"sample": sample, "train": train, "visualize": visualize, "export": sd_export}
    modules["evaluation"] = evaluation

    def main(script, *args, own=("--device", "cpu", "--amp", "no")):
        monkeypatch.setattr("sys.argv", [script, *map(str, args), *own])
        modules[script].main()

    return main


def trained(faces, folder, **more):
    """The model.pt of a run of a second."""
    run(Config(**tiny_run(faces, folder) | dict(loss="l2") | more))
    return folder / "run" / "model.pt"


@pytest.mark.slow
@pytest.mark.parametrize("path, objective", GRID)
def test_every_path_with_every_objective(faces, tmp_path, call, path, objective):
    """Trained, resumed bit for bit, sampled from noise, from an image and around a mask."""
    options = tiny_run(faces, tmp_path) | dict(path=path, objective=objective, loss="l2")
    whole = tmp_path / "whole"
    run(Config(**options | dict(save_folder=str(whole))))
    run(Config(**options | dict(train_steps=8)))
    run(Config(**options))
    same_runs(whole, tmp_path / "run")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert held_out == sorted(held_out, reverse=True) and len(held_out) == 3

    pipeline = load(whole)
    labels = torch.tensor([0, 1])
    for name, spacing, steps in (("ddim", None, 1), ("heun", "karras", 6), ("ddpm", "flow", 5), ("unipc3", None, 33),
                                 ("dpmpp_3m_sde", "logsnr", 25), ("lcm", "linspace", 2), ("deis", "leading", 7)):  # fmt: skip
        made = pipeline.sample([0, 1], sampler=name, spacing=spacing, steps=steps, labels=labels)
        assert made.isfinite().all() and made.abs().max() < 1.6 and made.std() > 0.005
        alone = pipeline.sample([1], sampler=name, spacing=spacing, steps=steps, labels=labels[1:])
        assert_close(made[1:], alone, rtol=0, atol=2 / 255)

    image = next(faces.rglob("*.png"))
    mask = tmp_path / "mask.png"
    picture = Image.new("L", (24, 24))
    picture.paste(255, (12, 0, 24, 24))
    picture.save(mask)
    common = ["--load_path", whole, "--num_images", 2, "--steps", 10, "--class_label", 1]
    common += ["--guidance_scale", 2, "--init_image", image]
    call("sample", *common, "--strength", 0.1, "--save_folder", tmp_path / "near")
    call("sample", *common, "--mask", mask, "--save_folder", tmp_path / "around")
    original = pixels(image)
    kept = pixels(tmp_path / "around/images/000000.png")
    assert (kept - original)[:, :, :7].abs().max() <= 2 / 255  # black stays
    assert (kept - original)[:, :, 9:].abs().mean() > 0.02
    near = pixels(tmp_path / "near/images/000001.png")
    assert (near - original).abs().mean() < 0.5
    text = Image.open(tmp_path / "near/images/000000.png").text["parameters"]
    assert (f"Path: {path}" in text) == (path != "vp") and f"Objective: {objective}" in text


def pixels(file) -> torch.Tensor:
    """An image of a run's size, 16 px, from 0 to 1."""
    from diffusion.data.images import read_image

    return torch.from_numpy(read_image(file, 16)).permute(2, 0, 1) / 255


@pytest.mark.slow
def test_options_of_sampling_are_in_the_picture(model, tmp_path, call):
    def text(folder: str) -> str:
        return Image.open(tmp_path / folder / "images/000000.png").text["parameters"]

    common = ["--load_path", model, "--num_images", 1, "--steps", 9]
    call("sample", *common, "--sampler", "heun", "--churn", 20, "--save_folder", tmp_path / "churn")
    call("sample", *common, "--sampler", "heun", "--save_folder", tmp_path / "heun")
    call("sample", *common, "--sampler", "euler_a", "--spacing", "flow", "--shift", 3,
         "--save_folder", tmp_path / "shift")  # fmt: skip
    call(
        "sample", *common, "--sampler", "ddpm", "--spacing", "flow", "--save_folder", tmp_path / "1"
    )
    call("sample", *common, "--sampler", "euler", "--save_folder", tmp_path / "euler")
    assert "Sampler: Heun" in text("churn") and "Churn: 20.0" in text("churn")
    assert "Churn" not in text("heun") and "Path" not in text("heun")
    assert "Sampler: Euler a" in text("shift") and "Shift: 3.0" in text("shift")
    assert "Sampler: Euler," in text("euler")
    files = [(tmp_path / f / "images/000000.png") for f in ("churn", "heun", "shift", "1")]
    churned, plain_, shifted, usual = map(pixels, files)
    assert (churned - plain_).abs().max() > 2 / 255 and (shifted - usual).abs().max() > 2 / 255
    with pytest.raises(UserError, match="churn is 3.0; ddim .*heun and dpm2"):
        call("sample", *common, "--sampler", "ddim", "--churn", 3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["edm", "jit"])
def test_a_killed_run_of_a_preset_resumes_bit_for_bit(faces, tmp_path, preset):
    options = {k: v for k, v in tiny_run(faces, tmp_path).items() if k != "time_steps"}
    command = [*flags(options | dict(train_steps=40, compile=False))[:-2], "--preset", f"none,{preset}"]  # fmt: skip
    command.remove("--no_compile")
    done = warm.script("train.py", *command, "--save_folder", tmp_path / "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = warm.Process("train.py", *command, cwd=tmp_path)
    wait_for_step(tmp_path / "run", 14, process)
    process.kill()
    process.wait()
    done = warm.script("train.py", *command, cwd=tmp_path)
    assert done.returncode == 0 and "from step " in done.stdout, done.stderr
    same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("process", [
    dict(path="edm", objective="edm"), dict(path="flow", objective="x0", loss_space="flow"),
])  # fmt: skip
def test_distance_page_and_evaluation_of_a_process(faces, tmp_path, call, pooled, process):
    model = trained(
        faces,
        tmp_path,
        fid=True,
        fid_every=6,
        fid_num_images=8,
        fid_features=str(pooled),
        **process,
    )
    lines = [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]
    distances = [v for line in lines for k, v in line.items() if "pooled" in k]
    assert len(distances) == 2 and all(map(math.isfinite, distances))
    call("visualize", "--load_path", model, "--data", faces, "--num_images", 2, "--steps", 4, "--sampler", "euler",
         "--html", "--save_folder", tmp_path)  # fmt: skip
    assert (tmp_path / "viz/index.html").stat().st_size > 10_000
    call("evaluation", faces, model, "--samplers", "euler:3,heun:4,euler_a:25", "--num_images", 6,
         "--fid_features", pooled, "--save_folder", tmp_path, own=("--device", "cpu"))  # fmt: skip
    rows = json.loads((tmp_path / "metrics/quality.json").read_text())["rows"]
    assert [row["evaluations"] for row in rows] == [3, 4, 25]


@pytest.mark.slow
@pytest.mark.parametrize("process", [
    dict(path="edm", objective="edm", sigma_data=1.0), dict(path="flow", objective="flow", noise_shift=3.0),
])  # fmt: skip
def test_latents_and_a_lora_of_a_process(latent, tmp_path, call, process):
    run(Config(**latent | process))
    model = tmp_path / "run" / "model.pt"
    tuned = dict(
        adapter="lora",
        rank=2,
        load_path=str(model),
        train_steps=4,
        save_folder=str(tmp_path / "lora"),
    )
    keep = ("data", "cache_dir", "device", "amp", "batch_size", "num_samples", "sample_steps")
    given = {k: latent[k] for k in keep}
    run(Config(**given | tuned), set(given | tuned))
    stored = Config.from_dict(json.loads((tmp_path / "lora/config.json").read_text()))
    assert {n: getattr(stored, n) for n in process} == process
    call("sample", "--load_path", model, "--lora", tmp_path / "lora/adapter.safetensors", "--prompt", "a face",
         "--steps", 3, "--guidance_scale", 2, "--save_folder", tmp_path / "out")  # fmt: skip
    assert Image.open(tmp_path / "out/images/000000.png").size == (16, 16)


@pytest.mark.slow
def test_stable_diffusion_is_tuned_as_a_flow(sd, faces, tmp_path, call):
    """train.py --path flow; its model samples as a flow; a LoRA of it; its export is the base's kind."""
    common = ["--data", faces, "--image_size", 32, "--batch_size", 4, "--save_and_sample_every", 4, "--num_samples", 1,
              "--sample_steps", 2, "--cache_dir", tmp_path / "cache"]  # fmt: skip
    call("train", "--sd_path", sd, "--path", "flow", "--train_steps", 4, "--learning_rate", 1e-3, *common,
         "--save_folder", tmp_path / "flow")  # fmt: skip
    model = tmp_path / "flow/model.pt"
    state = checkpoint.read(model)
    assert state["config"]["path"] == "flow" and state["config"]["objective"] == "eps"
    call("sample", "--load_path", model, "--prompt", "a cat", "--num_images", 1, "--steps", 3, "--spacing", "flow",
         "--shift", 3, "--save_folder", tmp_path / "out")  # fmt: skip
    assert "Path: flow" in Image.open(tmp_path / "out/images/000000.png").text["parameters"]
    for base in (["--load_path", model], ["--mode", "latent", "--sd_path", sd, "--path", "flow"]):
        folder = tmp_path / f"lora{len(base)}"
        call(
            "train",
            *base,
            "--adapter",
            "lora",
            "--train_steps",
            2,
            *common,
            "--save_folder",
            folder,
        )
        assert json.loads((folder / "config.json").read_text())["path"] == "flow"
    # the network still predicts eps at the levels of its base, which is what the export states
    call("export", model, tmp_path / "exported", own=())
    name = "scheduler/scheduler_config.json"
    own, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "exported", Path(sd)))  # fmt: skip
    for key in (
        "prediction_type",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "num_train_timesteps",
    ):
        assert own[key] == theirs[key]
    options = dict(prompts=["a cat"], steps=5, spacing="logsnr", sampler="dpmpp_2m", amp="no")
    as_flow = load(model, amp="no").sample([0], **options)
    exported = load(tmp_path / "exported", amp="no")
    assert_close(exported.sample([0], **options), as_flow, rtol=0, atol=1e-4)
    untouched = load(sd, amp="no").sample([0], **options)
    assert (untouched - as_flow).abs().max() > 1e-2  # it has learned


@pytest.mark.slow
@pytest.mark.parametrize("path, objective", [("edm", "edm"), ("flow", "flow"), ("vp", "v")])
def test_bf16_computes_the_same_function(faces, tmp_path, path, objective):
    pipeline = load(trained(faces, tmp_path, path=path, objective=objective))
    labels = torch.tensor([0, 1])
    options = dict(sampler="heun", steps=9, labels=labels)
    full = pipeline.sample([0, 1], amp="no", **options)
    half = pipeline.sample([0, 1], amp="bf16", **options)
    assert_close(half, full, rtol=0, atol=0.1)
    assert (half - full).abs().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    dict(path="edm", objective="edm", sigma_min=1e-6, sigma_max=1e4),
    dict(path="edm", objective="eps", sigma_min=1e-6, sigma_max=1e4),
    dict(path="flow", objective="eps", loss_space="x0", noise_dist="logit_normal", noise_std=10.0, noise_shift=100.0),
    dict(path="vp", objective="flow", zero_snr=True, min_snr_gamma=5.0),
    dict(path="vp", objective="v", zero_snr=True, noise_dist="lognormal", noise_std=10.0, noise_shift=100.0),
    dict(path="flow", objective="edm", time_steps=2), dict(path="vp", objective="eps", time_steps=2),
    dict(path="edm", objective="edm", noise_dist="lognormal", noise_std=0.01, loss="l1", loss_space="eps"),
])  # fmt: skip
def test_extreme_values_make_finite_pictures(faces, tmp_path, more):
    pipeline = load(trained(faces, tmp_path, train_steps=4, num_samples=0, **more))
    for name, spacing, steps in (
        ("ddim", None, 1),
        ("dpmpp_2m", "flow", 9),
        ("heun", None, 7),
        ("unipc3", None, 40),
    ):
        made = pipeline.sample([0], sampler=name, spacing=spacing, steps=steps, labels=torch.tensor([1]))  # fmt: skip
        assert made.isfinite().all() and made.abs().max() < 1.6
