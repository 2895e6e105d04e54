"""The U-Net: shapes, weight standardisation, padding, labels, checkpointing."""

import ast
import copy
import math
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.testing import assert_close

from diffusion.models import cpu, cuda, lora
from diffusion.models.build import build_pixel_unet, for_inference
from diffusion.models.cond import Cond
from diffusion.models.layers import Conv3x3, WSConv3x3, sinusoids
from diffusion.models.unet import Block, GroupNorm, LinearAttention, UNet, join_films


def small(**options) -> UNet:
    torch.manual_seed(0)
    model = UNet(8, (1, 2, 4), heads=2, min_dim_head=4, **options)
    return randomise(model)


def randomise(model):
    """Undo the zero initialisation, so that every branch counts."""
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("size", [8, 12, 13, 36])
def test_any_size_goes_through(size):
    model = small()
    x = torch.randn(2, 3, size, size + 3)
    assert model(x, torch.tensor([0.0, 7.5])).shape == x.shape


def test_padding_is_cropped_where_it_was_put():
    """A 13-pixel image gives what its replicate-padded 16-pixel version gives there."""
    model, x, t = small().eval(), torch.randn(1, 3, 13, 13), torch.zeros(1)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 3), mode="replicate")
    assert_close(model(x, t), model(padded, t)[..., :13, :13])


def test_starts_as_zero():
    """The output convolution starts at zero: a v network begins by predicting the mean."""
    assert UNet(8, (1, 2))(torch.randn(2, 3, 8, 8), torch.zeros(2)).abs().max() == 0


def test_four_levels_by_default():
    model = UNet(8)
    assert [len(level) for level in model.down] == [4] * 4 and model.factor == 8
    kinds = [type(level[2]).__name__ for level in model.down]
    assert kinds == ["LinearAttention"] * 3 + ["Attention"]
    assert type(model.mid[1]).__name__ == "Attention"


def test_time_and_labels_matter():
    model, x = small(num_classes=3).eval(), torch.randn(1, 3, 8, 8)
    t = torch.zeros(1)
    outs = [model(x, t, Cond(labels=torch.tensor([i]))) for i in range(4)]
    assert all(not torch.allclose(outs[0], o, atol=1e-4) for o in outs[1:])
    assert_close(model(x, t), outs[3])  # no label is the null label
    assert not torch.allclose(model(x, t + 5), outs[3], atol=1e-4)


def test_film_scales_and_shifts():
    block = Block(4, 8).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 8, dtype=torch.float64)
    found = block(x, torch.cat([scale, shift], 1))
    plain = block.norm(block.conv(x)).double()
    expected = F.silu(plain * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    assert_close(found, expected)


def test_weight_standardisation():
    conv = WSConv3x3(64, 32)
    with torch.no_grad():
        conv.weight.mul_(7).add_(3)  # it forgets mean and scale
    x = torch.randn(8, 64, 16, 16)
    y = conv(x) - conv.bias.view(1, -1, 1, 1)
    w = conv.weight
    n = 64 * 9
    expected = (w - w.mean((1, 2, 3), keepdim=True)) / (
        w.var((1, 2, 3), correction=0, keepdim=True) * n + 1e-5
    ).sqrt()
    assert_close(y, torch.nn.functional.conv2d(x, expected, padding=1), rtol=1e-4, atol=1e-4)
    assert_close(y.std().item(), 1.0, rtol=0.1, atol=0)  # the gain: unit in, unit out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_standardised_weights_do_not_depend_on_autocast(layout):
    """The same function under bf16: only rounding differs (lucidrains' eps changed with it)."""
    torch.manual_seed(0)
    conv = WSConv3x3(256, 32).to(memory_format=layout)
    x = torch.randn(2, 256, 8, 8)
    full = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x)
    assert half.dtype == torch.bfloat16
    assert_close(half.float().std(), full.std(), rtol=0.01, atol=0)
    assert_close(half.float(), full, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("size, dim", [((4, 4), 256), ((2, 3), 160), ((16, 16), 64)])
def test_a_product_of_patches_is_a_convolution(size, dim):
    """With gradients, in float64."""
    torch.manual_seed(0)
    conv = Conv3x3(8, dim).to(memory_format=torch.channels_last).double()
    x, y = (torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    w, b = (p.detach().clone().requires_grad_() for p in conv.parameters())
    g = torch.randn(2, dim, *size, dtype=torch.float64)
    cpu.product_of_patches(x, conv.weight, conv.bias).backward(g)
    torch.nn.functional.conv2d(y, w, b, padding=1).backward(g)
    assert_close([x.grad, conv.weight.grad, conv.bias.grad], [y.grad, w.grad, b.grad])


@pytest.mark.parametrize("amx, dtype, batch, size, dim, patches", [
    (True, torch.bfloat16, 16, 4, 256, True),
    (True, torch.bfloat16, 16, 4, 248, False),  # narrow
    (True, torch.float32, 16, 4, 256, False),
    (False, torch.bfloat16, 8, 4, 256, True),  # 128 positions
    (False, torch.bfloat16, 9, 4, 256, False),
    (False, torch.float32, 1, 4, 256, False),
])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_patches_where_they_pay(monkeypatch, amx, dtype, batch, size, dim, patches, autocast):
    monkeypatch.setattr(cpu, "AMX", amx)
    product = Mock(side_effect=cpu.product_of_patches)
    monkeypatch.setattr(cpu, "product_of_patches", product)
    kept = torch.float32 if autocast else dtype  # autocast decides, and not what comes
    conv = cpu.install(Conv3x3(8, dim)).to(kept, memory_format=torch.channels_last)
    x = torch.randn(batch, 8, size, size).to(kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
        out = conv(x)
    assert out.dtype == dtype
    assert product.called == patches


@pytest.mark.slow
@pytest.mark.parametrize("amx", [False, True])
def test_torch_compile_makes_one_graph_of_a_network(monkeypatch, amx):
    """In bfloat16: what a fast path asks of the CPU would cut it."""
    monkeypatch.setattr(cpu, "AMX", amx)
    network = build_pixel_unet(8, (1, 2))
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 400.0]))
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(network)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_for_inference_is_the_same_function(dtype):
    model, x, t = small().eval(), torch.randn(2, 3, 16, 16), torch.tensor([3.0, 400.0])
    ready = for_inference(model, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert torch.equal(ready(x, t), model(x, t))
        assert not any(isinstance(m, WSConv3x3) for m in ready.modules())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    if dtype is None:
        shared = {id(p) for p in model.parameters()} & {id(p) for p in ready.parameters()}
        assert len(shared) > len(list(model.parameters())) // 2


def test_a_convolution_by_1x1_is_one_product(monkeypatch):
    monkeypatch.setattr(cuda, "fits", lambda x: True)
    layer = torch.nn.Conv2d(6, 10, 1)
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = cuda.convolve(layer, x, layer.weight, layer.bias)
        assert_close(got, layer(x))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_all_films_by_one_product():
    model = small(num_classes=3)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 400.0])
    cond = Cond(labels=torch.tensor([0, 2]))
    want = model(x, t, cond)
    join_films(model)
    for name, p in model.named_parameters():
        if ".film." in name:
            p.data.zero_()  # what was joined is a copy
    assert_close(model(x, t, cond), want, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert_close(twin(x, t, cond), want, rtol=1e-4, atol=1e-5)


def test_films_with_branches_stay_apart():
    model = small()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 400.0])
    lora.inject(model, lora.find(model, "film"), 2, adapter="one")
    torch.nn.init.normal_(model.last.film.lora["one"].up.weight)
    want = model(x, t)
    join_films(model)
    assert torch.equal(model(x, t), want)


def test_under_autocast_the_network_stays_close():
    model, x, t = small().eval(), torch.randn(2, 3, 16, 16), torch.tensor([3.0, 400.0])
    full = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t)
    assert (half.float() - full).norm() / full.norm() < 0.03


def test_linear_attention_is_its_definition():
    torch.manual_seed(0)
    layer = randomise(LinearAttention(16, heads=2, dim_head=8))
    x = torch.randn(1, 16, 4, 4)
    h = layer.norm(x)[0].flatten(1).T  # (N, C)
    q, k, v = layer.to_qkv(h).chunk(3, dim=1)
    heads = []
    for i in range(2):
        part = slice(8 * i, 8 * i + 8)
        weights = q[:, part].softmax(1) @ k[:, part].softmax(0).T  # (N, N), rows need not sum to 1
        heads.append(weights @ v[:, part])
    expected = x + layer.to_out(torch.cat(heads, 1)).T.view(1, 16, 4, 4)
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_time_embedding_sinusoids():
    t, i = 12.5, 2
    freq = 10_000 ** (-i / 4)
    assert_close(
        sinusoids(torch.tensor([t]), 8)[0, [i, 4 + i]],
        torch.tensor([math.sin(t * freq), math.cos(t * freq)]),
    )


@pytest.mark.parametrize("channels, groups", [(8, 8), (12, 4), (16, 8), (512, 8), (3, 1)])
def test_groups_divide_the_channels(channels, groups):
    norm = cpu.install(GroupNorm(channels))
    assert norm.num_groups == groups
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, channels, 5, 4).to(memory_format=layout)
        wide = x.reshape(2, groups, -1)
        var, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
        assert_close(norm(x), ((wide - mean) / (var + 1e-5).sqrt()).view(x.shape))


def test_checkpointing_changes_nothing_but_memory():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 9.0])
    grads = []
    for flag in (False, True):
        model = small(dropout=0.2)
        model.checkpointing = flag
        torch.manual_seed(5)
        model(x, t).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert_close(a, b)


def test_every_parameter_gets_a_gradient():
    """DDP waits for every parameter's gradient in every step."""
    model = small(num_classes=2)
    cond = Cond(labels=torch.tensor([0, 2]))
    model(torch.randn(2, 3, 8, 8), torch.ones(2), cond).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_blank_networks_cost_nothing():
    """Neither memory nor time: drawing values on the meta device imports torch's compiler."""
    code = """
import sys, torch
from diffusion.models.build import blank
from diffusion.models.clip import CLIPTextModel
from diffusion.models.configs import CLIPTextConfig
from diffusion.models.unet import UNet
with blank():
    made = [UNet(1024, num_classes=5), CLIPTextModel(CLIPTextConfig()), torch.nn.Embedding(9, 9)]
assert all(p.is_meta for m in made for p in m.parameters())
assert "torch._dynamo" not in sys.modules
assert torch.nn.init.ones_(torch.zeros(2)).sum() == 2
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_network_is_the_same_with_and_without_fast_paths(monkeypatch):
    torch.manual_seed(0)
    fast = randomise(build_pixel_unet(32, (1, 8), num_classes=2))
    plain = UNet(32, (1, 8), num_classes=2).to(memory_format=torch.channels_last)
    plain.load_state_dict(fast.state_dict())
    patches = Mock(side_effect=cpu.product_of_patches)
    monkeypatch.setattr(cpu, "product_of_patches", patches)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 400.0])
    assert_close(fast(x, t), plain(x, t), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(fast(x, t), plain(x, t), rtol=0.05, atol=0.05)
    assert patches.called  # 256 channels at 2x2


def test_every_network_of_the_package_is_built_with_its_fast_paths():
    """By models/build.py, which installs them: nobody else calls the classes of networks."""
    classes = {"UNet", "SDUNet", "AutoencoderKL", "CLIPTextModel", "CLIPModel"}
    for path in (ROOT / "diffusion").rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        made = {getattr(f, "id", getattr(f, "attr", None)) for f in calls} & classes
        assert not made or path.name == "build.py", f"{path} makes {made}"
