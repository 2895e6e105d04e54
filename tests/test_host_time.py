"""What a GPU would wait for the host for: folding, noise, files, features."""

from dataclasses import replace

import pytest
import torch
from helpers import stand_in_for_graphs
from torch import nn

from diffusion.models import lora
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


CHANGES = {
    "in place": scale,
    "all": lambda unet: unet.load_state_dict({k: v / 2 for k, v in unet.state_dict().items()}),
    "another parameter": replace_one,
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
