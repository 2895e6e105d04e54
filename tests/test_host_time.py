"""What a GPU would wait for the host for: folding, noise, files, features."""

import errno
import math
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import stand_in_for_graphs
from torch import nn

from diffusion.evaluation import fid
from diffusion.evaluation.features import open_features
from diffusion.evaluation.fid import Fid
from diffusion.models import lora
from diffusion.models.build import build_pixel_unet
from diffusion.models.cond import Cond
from diffusion.pictures import samples
from diffusion.pictures.samples import Samples, behind
from diffusion.runtime import distributed as dist
from diffusion.runtime.cuda_graph import Graphs
from diffusion.runtime.seeding import ImageNoise, generator
from diffusion.sampling import pipeline as module
from diffusion.sampling.load import load

OPTIONS = dict(labels=torch.tensor([1]), sampler="ddim", steps=2)


@pytest.fixture
def folds(monkeypatch) -> list:
    """The networks that are folded."""
    found = []

    def counted(network, dtype):
        found.append(network)
        return fold(network, dtype)

    fold = module.for_inference
    monkeypatch.setattr(module, "for_inference", counted)
    return found


def add_branch(unet) -> None:
    """Put a LoRA beside the first convolution."""
    layer = next(name for name, kind in lora.layers(unet).items() if isinstance(kind, nn.Conv2d))
    lora.inject(unet, [layer], 2, adapter="one")
    nn.init.ones_(unet.get_submodule(layer).lora["one"].up.weight)


@torch.no_grad()
def scale(unet) -> None:
    for p in unet.parameters():
        p.mul_(1.1)


def replace_one(unet) -> None:
    unet.out.weight = nn.Parameter(unet.out.weight * 1.1)


def replace_data(unet) -> None:
    unet.out.weight.data = unet.out.weight.data * 1.1


CHANGES = {
    "in place": scale,
    "all": lambda unet: unet.load_state_dict({k: v / 2 for k, v in unet.state_dict().items()}),
    "another parameter": replace_one,
    "another again": replace_one,
    "other data": replace_data,
    "a branch": add_branch,
    "its weight": lambda unet: lora.set_weights(unet, {"one": 0.5}),
    "merged": lora.merge,
    "a hook": lambda unet: unet.register_forward_hook(lambda layer, given, out: -out),
}


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_network_is_folded_once_until_it_changes(model, folds, amp):
    pipeline = load(model)
    options = OPTIONS | {"amp": amp}
    last = pipeline.sample([0], **options)
    for name, change in CHANGES.items():
        for _ in range(2):
            assert torch.equal(pipeline.sample([0], **options), last), name
        change(pipeline.model)
        folds.clear()
        got = pipeline.sample([0], **options)
        assert len(folds) == 1, name
        fresh = replace(pipeline, ready={}, graphs=Graphs())
        torch.testing.assert_close(got, fresh.sample([0], **options), rtol=0, atol=0)
        if name != "merged":
            assert not torch.equal(got, last), name
        last = got


def test_weights_made_in_inference_mode_are_folded_at_every_call(model, folds):
    with torch.inference_mode():
        pipeline = load(model)
        assert all(p.is_inference() for p in pipeline.model.parameters())
        first = pipeline.sample([0], **OPTIONS)
        for p in pipeline.model.parameters():
            p.mul_(1.1)
        assert not torch.equal(pipeline.sample([0], **OPTIONS), first)
    assert len(folds) == 2


def test_a_table_is_learned_with_what_inference_mode_has_folded(model):
    pipeline = load(model)
    with torch.inference_mode():
        pipeline.sample([0], **OPTIONS)
    table = pipeline.table("ddim", 2)
    table = replace(table, to_x=table.to_x.clone().requires_grad_())
    options = {"labels": OPTIONS["labels"], "amp": "no"}
    *_, (x, _) = pipeline.frames([0], table=replace(table, to_y=table.to_x), **options)
    x.square().mean().backward()
    assert table.to_x.grad.abs().sum() > 0


def test_graphs_share_one_network_and_go_with_it(model, folds, monkeypatch):
    stand_in_for_graphs(monkeypatch)
    pipeline = load(model)
    pipeline.guide = load(model)
    options = dict(cuda_graph=True, sampler="ddim", steps=2, guidance_scale=2.0, amp="no")

    def sample(count: int) -> None:
        pipeline.sample(range(count), labels=torch.zeros(count, dtype=int), **options)

    for count in (1, 2, 3, 2, 1):
        sample(count)
    keys = [key for key, _ in pipeline.graphs.graphs]
    assert len(keys) == 3 and len({key[:2] for key in keys}) == 1
    assert len(folds) == 2  # and the guide's
    scale(pipeline.guide.model)
    sample(1)
    assert len(folds) == 3 and len(pipeline.graphs.graphs) == 4  # not the old one
    scale(pipeline.model)
    sample(1)
    assert len(folds) == 4 and len(pipeline.graphs.graphs) == 1
    assert len(pipeline.ready) == 1


def test_each_image_continues_its_own_stream():
    noise = ImageNoise(3, [5, 7], (3, 4, 5))
    for i, g in ((0, generator(3, "image", 5)), (1, generator(3, "image", 7))):
        own = ImageNoise(3, [5, 7], (3, 4, 5))
        for _ in range(3):
            assert torch.equal(own()[i], torch.randn((3, 4, 5), generator=g))
    assert not torch.equal(noise(), noise())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_gpu_no_row_waits_for_the_device(model, graph):
    pipeline = load(model, device="cuda")
    rows = pipeline.frames([0], sampler="dpmpp_2m_sde", steps=6, cuda_graph=graph)
    next(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(rows)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- files and features, behind the sampling ------------------------------------------------------

GPU = torch.device("cuda")  # its name is all that `behind` asks for


@pytest.fixture
def in_a_thread(monkeypatch) -> None:
    """Let what a GPU's host does in a thread be done in one here."""
    for where in (samples, fid):
        monkeypatch.setattr(where, "behind", lambda function, device: behind(function, GPU))


def test_calls_behind_keep_their_order_and_their_errors():
    done = []

    def work(i: int) -> None:
        time.sleep(0.01)
        if i == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append((i, threading.current_thread() is threading.main_thread()))

    for device, thread in ((torch.device("cpu"), True), (GPU, False)):
        done.clear()
        with pytest.raises(OSError, match="No space"), behind(work, device) as call:
            for i in (0, 1, 2):
                call(i)
        with behind(work, device) as call:
            call(3)
        assert done == [(0, thread), (1, thread), (3, thread)]


def written(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.png"))}


def make(model, folder, count: int = 5) -> Samples:
    pipeline = load(model)
    options = {"sampler": "ddim", "steps": 2, "amp": "no"}
    give = lambda indices: {"labels": pipeline.labels("all", indices), **options}
    return Samples(
        pipeline, give, lambda options, row, i, image: f"{row} {i}", folder, count, 2, False
    )


def test_pictures_are_written_while_the_next_are_sampled(model, tmp_path, monkeypatch, in_a_thread):
    make(model, tmp_path / "threaded").write_images()
    monkeypatch.setattr(samples, "behind", behind)
    make(model, tmp_path / "plain").write_images()
    got = written(tmp_path / "threaded")
    assert got == written(tmp_path / "plain") and len(got) == 6


def test_a_full_disk_and_ctrl_c_leave_the_pictures_before(
    model, tmp_path, monkeypatch, in_a_thread
):
    def full(image, path, text=None):
        if text["parameters"] == "0 2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(image, path, text)

    write = samples.write_png
    with monkeypatch.context() as patched:
        patched.setattr(samples, "write_png", full)
        with pytest.raises(OSError, match="No space"):
            make(model, tmp_path / "full").write_images()
    assert list(written(tmp_path / "full")) == ["images/000000.png", "images/000001.png"]

    made = make(model, tmp_path / "stopped")
    decode = made.pipeline.codec.decode
    calls = []

    def stop(codec, x):
        calls.append(x)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(x)

    monkeypatch.setattr(type(made.pipeline.codec), "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        made.write_images()
    assert len(written(tmp_path / "stopped")) == 4
    left = [f.name for f in tmp_path.rglob(".*") if f.suffix == ".tmp" or "images_" in f.name]
    assert not left


def fid_of(pipeline, pooled) -> Fid:
    """A measurement of 7 images against made-up statistics."""
    reference = (torch.zeros(24, dtype=torch.float64), torch.eye(24, dtype=torch.float64))
    found = object.__new__(Fid)
    vars(found).update(
        config=replace(pipeline.config, fid_num_images=7, fid_features=str(pooled)),
        features=open_features(str(pooled), pipeline.device),
        name="pooled",
        steps=3,
        reference=reference,
        train=None,
        conditioning=lambda indices: {"labels": pipeline.labels_in_turn(indices)},
    )
    return found


def test_fid_is_the_same_behind_the_sampling(model, pooled, in_a_thread, monkeypatch):
    pipeline = load(model)
    found = fid_of(pipeline, pooled)
    threaded = found.measure(pipeline, 2, lambda: False)
    monkeypatch.setattr(fid, "behind", behind)
    assert threaded["pooled"] == found.measure(pipeline, 2, lambda: False)["pooled"] > 0
    assert found.measure(pipeline, 2, lambda: True) is None
    calls = []

    def second_overflows(codec, x):
        calls.append(x)
        return x * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(type(pipeline.codec), "decode", second_overflows)
    assert math.isnan(found.measure(pipeline, 2, lambda: False)["pooled"])


@pytest.mark.gpu
def test_gpu_fid_by_graphs_and_in_a_thread(model, pooled):
    values = []
    for device in ("cpu", "cuda"):
        pipeline = load(model, device=device)
        values.append(fid_of(pipeline, pooled).measure(pipeline, 2, lambda: False)["pooled"])
    assert values[1] == pytest.approx(values[0], rel=1e-2)


# --- several ranks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_network_with_checkpointing_trains_on_several_ranks():
    """Of more than a bucket of gradients, of which the checkpoints of torch 2.6 allow no cut."""
    model = build_pixel_unet(24, (1, 2, 4, 8))
    assert sum(p.numel() for p in model.parameters()) * 4 > 25e6
    model.checkpointing = True
    model.train().compile(backend="aot_eager")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # fmt: skip
    before = torch._dynamo.config.optimize_ddp
    try:
        parallel = dist.wrap(model)
        parallel(torch.randn(2, 3, 8, 8), torch.rand(2), Cond()).sum().backward()
        assert any(p.grad.abs().sum() > 0 for p in model.parameters())
    finally:
        torch._dynamo.config.optimize_ddp = before
        dist.cleanup()
