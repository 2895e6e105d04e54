"""sample.py: the seeds contract, ranks, settings, and files that are no checkpoints."""

import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import script
from helpers import stand_in_for_graphs
from PIL import Image
from safetensors.torch import save_file

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.pictures import grid as viz
from diffusion.runtime import precision
from diffusion.runtime.precision import amp_dtype
from diffusion.runtime.seeding import ImageNoise
from diffusion.sampling.load import build_network, load
from diffusion.training.trainer import train


def pictures(folder) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(p)) for p in sorted((folder / "images").iterdir())]
    ).astype(int)


def run(model, folder, *args, ranks=0) -> np.ndarray:
    """sample.py as a process of its own."""
    done = warm.script(
        "sample.py", *arguments(model, folder), *args, cwd=folder.parent, ranks=ranks
    )
    assert done.returncode == 0, done.stderr
    return pictures(folder)


def arguments(model, folder) -> list:
    return ["--load_path", model, "--save_folder", folder, "--amp", "no", "--device", "cpu"]


@pytest.fixture
def call(monkeypatch):
    """sample.py's main in this process."""
    from diffusion.commands import sample

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        sample.main()

    return main


def test_noise_of_an_image_depends_on_seed_and_index_only():
    a = ImageNoise(3, range(5), (3, 4, 4))
    b = ImageNoise(3, [4, 2], (3, 4, 4))
    for _ in range(3):  # each image's own stream advances
        x, y = a(), b()
        assert torch.equal(x[[4, 2]], y)
    assert not torch.equal(ImageNoise(4, [2], (3, 4, 4))(), ImageNoise(3, [2], (3, 4, 4))())


def test_images_grid_and_seeds(model, tmp_path):
    six = run(model, tmp_path / "a", "--num_images", 6, "--batch_size", 6, "--sampler", "ddpm")
    assert six.shape == (6, 16, 16, 3)
    assert sorted(p.name for p in (tmp_path / "a" / "images").iterdir()) == [
        f"{i:06d}.png" for i in range(6)
    ]
    assert Image.open(tmp_path / "a" / "grid.png").size == (6 * (3 * 18 + 2), 6 * (2 * 18 + 2))
    cut = run(model, tmp_path / "b", "--num_images", 5, "--batch_size", 2, "--sampler", "ddpm")
    assert abs(six[:5] - cut).max() <= 2
    ranks = run(
        model, tmp_path / "c", "--num_images", 5, "--batch_size", 2, "--sampler", "ddpm", ranks=2
    )
    assert np.array_equal(cut, ranks)
    other = run(model, tmp_path / "d", "--num_images", 5, "--batch_size", 2, "--seed", 1)
    assert not np.array_equal(cut, other)


@pytest.mark.parametrize("settings", [
    dict(sampler="ddim", steps=1), dict(sampler="ddim", eta=0.5), dict(sampler="ddpm_large"),
    dict(sampler="dpmpp_2m", steps=7), dict(sampler="dpmpp_2m_sde", steps=7, spacing="logsnr"),
    dict(sampler="ddim", spacing="leading"), dict(sampler="dpmpp_2m", spacing="linspace", steps=5),
    dict(guidance_scale=3.0, guidance_rescale=0.7), dict(amp="bf16"),
], ids=str)  # fmt: skip
def test_settings(model, settings):
    pipeline = load(model)
    labels = torch.tensor([0, 1, 2])
    x = pipeline.sample(range(3), labels=labels, **{"amp": "no"} | settings)
    assert x.shape == (3, 3, 16, 16) and x.isfinite().all() and x.abs().max() <= 1.01


def test_exactly_as_many_evaluations_as_asked(model):
    pipeline = load(model)
    calls = []
    pipeline.model.register_forward_hook(lambda *_: calls.append(1))
    for sampler in ("ddpm", "ddpm_large", "ddim", "dpmpp_2m", "dpmpp_2m_sde"):
        for steps in (1, 7, 13):
            calls.clear()
            pipeline.sample([0], sampler=sampler, steps=steps, amp="no")
            assert len(calls) == steps


def test_labels_and_guidance_change_the_picture(model):
    pipeline = load(model)
    draw = lambda label, scale: pipeline.sample(
        [0], labels=torch.tensor([label]), guidance_scale=scale, amp="no"
    )
    assert not torch.allclose(draw(0, 1), draw(1, 1), atol=1e-3)
    assert not torch.allclose(draw(0, 1), draw(0, 4), atol=1e-3)
    null = pipeline.model.null_label
    assert torch.allclose(draw(null, 5), draw(null, 1), atol=1e-5)
    assert torch.allclose(pipeline.sample([0], amp="no"), draw(null, 1), atol=1e-5)


def test_class_label_by_name_and_number(model, tmp_path, call):
    def draw(name, *args):
        call(*arguments(model, tmp_path / name), "--num_images", 3, "--batch_size", 1, *args)
        return pictures(tmp_path / name)

    a, b = draw("a", "--class_label", "spiky"), draw("b", "--class_label", "2")
    assert np.array_equal(a, b)
    everything = draw("c", "--class_label", "all")
    assert np.array_equal(everything[2], a[2]) and not np.array_equal(everything[0], a[0])


def test_weights_ema_raw_and_safetensors(model):
    ema, raw = load(model), load(model, "raw")
    file = load(model.parent / "ema.safetensors")
    draw = lambda p: p.sample([0], amp="no")
    assert torch.equal(draw(ema), draw(file)) and not torch.equal(draw(ema), draw(raw))
    with pytest.raises(UserError, match="ema.safetensors .*--weights raw"):
        load(model.parent / "ema.safetensors", "raw")


# --- files that are no checkpoints -----------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_foreign_and_broken_files(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(path, named=""):
        with pytest.raises(UserError, match=f"^{path} .*{named}"):
            load(path)

    refused("nowhere.pt")
    (tmp_path / "empty.pt").touch()
    refused("empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    refused("text.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"format": Evil()}))
    refused("evil.pt")
    torch.save({"model": Evil()}, "evil2.pt")
    refused("evil2.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"state_dict": {}}, "other.pt")
    refused("other.pt", "no weights")
    torch.save([1], "list.pt")
    refused("list.pt", "a list")
    data = model.read_bytes()
    for percent in (1, 10, 50, 90, 99):
        (tmp_path / "cut.pt").write_bytes(data[: len(data) * percent // 100])
        refused("cut.pt")
    with zipfile.ZipFile("plain.pt", "w") as z:
        z.writestr("a", "b")
    refused("plain.pt")
    file = (model.parent / "ema.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(file[:5000])
    refused("cut.safetensors")
    save_file({"a": torch.zeros(1)}, "lora.safetensors")
    refused("lora.safetensors")
    state = checkpoint.read(model)
    state["config"]["unet_dim"] = 16
    torch.save(state, "misfit.pt")
    refused("misfit.pt", r" is \(.*\), expected \(")
    torch.save(state | {"ema": {1: torch.zeros(1)}}, "number.pt")
    refused("number.pt", "left over 1: 1")
    state["config"]["colour"] = 1
    torch.save(state, "newer.pt")
    with pytest.raises(UserError, match="colour"):
        load("newer.pt")


@pytest.mark.parametrize("args, named", [
    (["--steps", "0"], "steps"),
    (["--sampler", "rk45"], "ddpm, ddpm_large"),
    (["--spacing", "evenly"], "leading, trailing"),
    (["--class_label", "cat"], "0 bald, 1 bob, 2 spiky"),
    (["--num_images", "0"], "num_images"),
    (["--stepz", "3"], "--steps"),
    (["--amp", "fp16"], "fp16"),
    (["--sampler", "ddpm_large", "--eta", "0"], "eta is 0.0; ddpm_large"),
    (["--guidance_scale", "3"], "class label"),
    (["--load_path", "gone.pt"], "gone.pt"),
], ids=str)  # fmt: skip
def test_mistakes_show_before_any_picture(model, tmp_path, args, named, call, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        call("--load_path", model, "--save_folder", tmp_path / "out", "--device", "cpu", *args)
    assert named in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    done = script("sample.py", "--load_path", "gone.pt", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: gone.pt ") and done.stderr.count("\n") == 1


def test_an_unconditional_model_takes_no_label(tmp_path, faces):
    train(Config(data=str(faces), image_size=8, unet_dim=8, dim_mults=(1,), heads=1, train_steps=1, num_samples=0,
                 device="cpu", save_folder=str(tmp_path / "r"), cache_dir=str(tmp_path / "c")))  # fmt: skip
    with pytest.raises(UserError, match="--condition class"):
        load(tmp_path / "r" / "model.pt").sample([0], guidance_scale=2.0)


# --- the rest ---------------------------------------------------------------------------------------------


def test_model_pt_is_a_link_to_the_newest_or_a_copy(model, tmp_path, monkeypatch):
    step = model.parent / "checkpoints" / "step_00000060.pt"
    assert os.path.samefile(model, step)
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("not supported")))
    checkpoint.save(tmp_path, checkpoint.read(model), 3)
    assert (tmp_path / "model.pt").read_bytes() == (
        tmp_path / "checkpoints" / "step_00000060.pt"
    ).read_bytes()


def test_pictures(tmp_path):
    x = torch.tensor([-2.0, -1, 0, 1, 2]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    images = viz.to_uint8(x)
    assert images[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    grid = np.asarray(viz.grid(images, columns=3, gap=1))
    assert grid.shape == (2 * 3 + 1, 3 * 3 + 1, 3)
    assert [grid[y, x, 0] for y, x in ((1, 1), (4, 4), (0, 0), (1, 7))] == [0, 255, 255, 128]


@pytest.mark.parametrize("given, needed", [
    ("--points 3", "--lora_interpolate"), ("--points 0", "--lora_interpolate"),
    ("--strength 0.5", "--init_image"), ("--mask m.png", "--init_image"),
    ("--negative_prompt grey", "--prompt"), ("--guidance_rescale 0.7", "--guidance_scale"),
    ("--sequential_guidance --guidance_scale 1", "--guidance_scale"),
])  # fmt: skip
def test_options_that_would_do_nothing_are_refused(call, given, needed):
    with pytest.raises(UserError, match=needed):
        call(*given.split())


@pytest.mark.parametrize("has", [(), ("amx",), ("avx512_bf16",)])
def test_amp_choices(monkeypatch, has):
    cpu = torch.device("cpu")
    for name, check in precision.PRODUCTS.items():
        monkeypatch.setattr(torch.cpu, check, lambda name=name: name in has)
    assert amp_dtype("no", cpu) is None and amp_dtype("bf16", cpu) == torch.bfloat16
    assert amp_dtype("auto", cpu) == (torch.bfloat16 if has else None)
    told = precision.describe("auto", cpu)
    assert told.startswith("bfloat16" if has else "float32") and all(name in told for name in has)
    with pytest.raises(UserError, match="fp16"):
        amp_dtype("fp16", cpu)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says what the CPU has")
def test_what_the_cpu_has_is_what_linux_says():
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    known = {"amx": {"amx_tile", "amx_bf16"} <= flags, "avx512_bf16": "avx512_bf16" in flags}
    for name, check in precision.PRODUCTS.items():
        if hasattr(torch.cpu, check):
            assert getattr(torch.cpu, check)() <= known[name]  # the system may forbid what there is
    found = precision.bf16_products()
    assert found is None or known[found]
    assert found or not known["avx512_bf16"]


def test_null_label_is_beyond_the_classes():
    assert build_network(Config(condition="class"), 7).null_label == 7
    assert build_network(Config(), 7).label is None


def test_graphs_are_captured_once_and_used_again(model, monkeypatch):
    """With a stand-in for the capture: frames of equal settings and shapes share one."""
    captured = stand_in_for_graphs(monkeypatch)
    plain, pipeline = load(model), load(model)
    options = dict(sampler="dpmpp_2m_sde", steps=4, labels=torch.tensor([1, 0, 2]))
    for seed, scale, count in ((0, 1.0, 1), (1, 1.0, 1), (1, 3.0, 2), (2, 3.0, 2)):
        options |= dict(seed=seed, guidance_scale=scale)
        got = pipeline.sample(range(3), cuda_graph=True, **options)
        assert torch.equal(got, plain.sample(range(3), **options))
        assert len(captured) == count
    options["labels"] = options["labels"][:2]
    pipeline.sample(range(2), cuda_graph=True, **options)
    assert len(captured) == 3


def test_graphs_need_cuda(model, call, tmp_path):
    with pytest.raises(ValueError, match="CUDA.* cpu"):
        load(model).sample([0], cuda_graph=True)
    with pytest.raises(UserError, match="--cuda_graph"):
        call(*arguments(model, tmp_path / "s"), "--cuda_graph", "on")


def test_a_model_is_checked_before_it_moves_to_its_device(model):
    """The numbers are looked at on the CPU: another device's are refused, as a file's."""
    found = load(model, device="meta")
    assert {p.device.type for p in found.model.parameters()} == {"meta"}


@pytest.mark.gpu
def test_gpu_graphs_draw_the_same_pictures(model):
    pipeline = load(model, device="cuda")
    for sampler in ("ddim", "ddpm", "dpmpp_2m_sde"):
        for amp in ("no", "auto"):
            for seed, n in ((0, 4), (1, 4), (2, 3)):
                options = dict(sampler=sampler, amp=amp, seed=seed, steps=10)
                eager, graph = (
                    pipeline.sample(range(n), cuda_graph=g, **options) for g in (False, True)
                )
                assert (eager - graph).abs().max() * 127.5 < 1, (sampler, amp, seed)
    assert len(pipeline.graphs.graphs) == 12  # three samplers, two precisions, two batch sizes


@pytest.mark.gpu
def test_gpu_pictures_are_those_of_the_cpu(model):
    cpu, gpu = (load(model, device=d) for d in ("cpu", "cuda"))
    for sampler in ("ddim", "ddpm", "dpmpp_2m"):
        a, b = (p.sample(range(4), sampler=sampler, amp="no").cpu() for p in (cpu, gpu))
        assert (a - b).abs().max() * 127.5 < 2


def test_the_folder_is_not_needed_after_loading(model, tmp_path):
    copy = tmp_path / "model.pt"
    shutil.copyfile(model, copy)
    pipeline = load(copy)
    copy.unlink()
    assert pipeline.sample([0], steps=2).isfinite().all()


def test_a_loaded_model_is_its_own(model, tmp_path):
    """The weights stay as they were when the file is written over in place."""
    file = tmp_path / "model.pt"
    shutil.copyfile(model, file)
    pipeline = load(file)
    before = {k: v.clone() for k, v in pipeline.model.state_dict().items()}
    with open(file, "r+b") as out:
        out.write(bytes(file.stat().st_size))
    for k, v in pipeline.model.state_dict().items():
        assert torch.equal(v, before[k])
        assert v.dtype == torch.float32 and (v.dim() < 4 or v.is_contiguous(memory_format=torch.channels_last))  # fmt: skip
