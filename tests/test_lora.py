"""LoRA on networks: identity, closed form, merging, what it may be injected into."""

import copy
import re

import pytest
import torch
from helpers import sd_unet
from torch import nn
from torch.testing import assert_close

from diffusion.models import lora
from diffusion.models.clip import CLIPTextModel
from diffusion.models.cond import Cond
from diffusion.models.configs import CLIPTextConfig, UNetConfig
from diffusion.models.layers import WSConv3x3
from diffusion.models.sd_unet import SDUNet
from diffusion.models.unet import UNet


def pixel_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(8, (1, 2), heads=2)
    nn.init.normal_(unet.out.weight, std=0.1)
    return unet.eval()


def text() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(24, 48, 2, 2, vocab_size=50, max_position_embeddings=12, eos_token_id=49)).eval()  # fmt: skip


NETWORKS = {
    "sd": (sd_unet, lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), Cond(torch.randn(2, 5, 24)))),
    "pixel": (pixel_unet, lambda: (torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))),
    "text": (text, lambda: (torch.randint(50, (2, 12)),)),
}  # fmt: skip


def scramble(model, seed=1) -> None:
    """Branches that do something."""
    torch.manual_seed(seed)
    for *_, branch in lora.branches(model):
        nn.init.normal_(branch.up.weight, std=0.1)


@pytest.fixture(params=NETWORKS)
def network(request):
    make, inputs = NETWORKS[request.param]
    model = make()
    return model, inputs()


@torch.no_grad()
def test_injecting_changes_nothing_and_merging_neither(network):
    """Bit for bit at injection; merged within float32 rounding; once."""
    model, inputs = network
    plain = model(*inputs)
    lora.inject(model, lora.find(model, "all"), 3, 6.0)
    assert torch.equal(model(*inputs), plain)
    scramble(model)
    apart = model(*inputs)
    assert (apart - plain).abs().max() > 1e-2
    lora.merge(model)
    assert_close(model(*inputs), apart, rtol=1e-4, atol=1e-5)
    lora.merge(model)  # once is enough
    assert_close(model(*inputs), apart, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'default' is merged"):
        lora.set_weights(model, {"default": 0.5})


@torch.no_grad()
@pytest.mark.parametrize("layer, x", [
    (nn.Linear(6, 5), torch.randn(2, 7, 6)),
    (nn.Conv2d(6, 5, 1), torch.randn(2, 6, 4, 4)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(2, 6, 7, 7)),
], ids=["linear", "1x1", "3x3"])  # fmt: skip
def test_closed_form(layer, x):
    """h = W x + w alpha/r up down x, where the product of the convolutions is written out."""
    model = nn.Sequential(layer)
    lora.inject(model, ["0"], rank=2, alpha=3.0, adapter="a")
    lora.inject(model, ["0"], rank=4, adapter="b")
    scramble(model)
    lora.set_weights(model, {"a": 0.5, "b": -2.0})
    a, b = (lora.state(model, name)["0"] for name in "ab")
    product = lambda low: torch.einsum("or,ri...->oi...", low.up.flatten(1), low.down)  # noqa: E731
    W = layer.weight + 0.5 * 3 / 2 * product(a) - 2 * product(b)
    expected = x @ W.T + layer.bias if x.ndim == 3 else layer._conv_forward(x, W, layer.bias)
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    lora.merge(model)
    assert_close(layer.weight, W, rtol=1e-5, atol=1e-6)


def test_state_and_load_are_inverse():
    model, again = sd_unet(), sd_unet()
    lora.inject(model, lora.find(model, "attention,conv"), 2, 1.0)
    scramble(model)
    lora.load(again, lora.state(model), "x", weight=1.0)
    inputs = NETWORKS["sd"][1]()
    with torch.no_grad():
        assert torch.equal(model(*inputs), again(*inputs))
    low = lora.state(model)
    name = next(iter(low))
    wrong = {name: low[name]._replace(down=torch.zeros(2, 99))}
    with pytest.raises(ValueError, match=re.escape(f"{name}: down is (2, 99)")):  # fmt: skip
        lora.load(again, wrong, "y")
    with pytest.raises(ValueError, match="'x'"):
        lora.load(again, low, "x")


def test_targets():
    """The counts are those of the modules that diffusers' scripts and kohya's train."""
    with torch.device("meta"):
        unet, clip = SDUNet(UNetConfig()), CLIPTextModel(CLIPTextConfig())
    assert len(lora.find(unet, "attention")) == 128  # train_text_to_image_lora.py
    assert len(lora.find(unet, "attention,mlp")) == 192  # kohya
    assert len(lora.find(clip, "attention,mlp")) == 72
    convs = [
        n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert {n for n in convs if n not in ("conv_in", "conv_out")} <= set(lora.find(unet, "conv"))
    every = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(lora.find(unet, "all")) == every
    assert lora.find(unet, r"mid_block.*attn2\.to_k") == [
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    ]
    pixel = pixel_unet()
    kinds = {type(m) for n, m in pixel.named_modules() if n in lora.find(pixel, "all")}
    assert WSConv3x3 not in kinds and kinds == {nn.Linear, nn.Conv2d}
    assert "down.0.2.to_qkv" in lora.find(pixel, "attention")
    assert {"down.0.3", "up.0.0.skip", "up.0.3.1"} <= set(lora.find(pixel, "conv"))
    for targets, told in (
        (
            "attentoin",
            "attentoin.* none of the .* layers.*attention, mlp, conv, all.*time_embedding.linear_1",
        ),
        ("block1.conv", "block1.conv.* none"),  # weight-standardised
        ("(", "regular expression"),
    ):
        with pytest.raises(ValueError, match=told):
            lora.find(pixel if targets.startswith("block") else unet, targets)
    with pytest.raises(ValueError, match="rank is 0"):
        lora.inject(pixel, ["stem"], 0)


def test_only_branches_learn_and_stay_float32_beside_half_precision():
    unet = sd_unet().to(torch.bfloat16).requires_grad_(False).train()
    lora.inject(unet, lora.find(unet, "attention"), 2, dropout=0.5)
    scramble(unet)
    learning = [p for p in unet.parameters() if p.requires_grad]
    assert learning and all(p.dtype == torch.float32 for p in learning)
    x, t, cond = NETWORKS["sd"][1]()
    x, cond = x.bfloat16(), Cond(cond.context.bfloat16())
    out = unet(x, t, cond)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learning)
    # dropout: another mask each time in training, none in evaluation
    assert not torch.equal(unet(x, t, cond), out)
    unet.eval()
    a, b = (unet(x, t, cond) for _ in range(2))
    assert torch.equal(a, b)


def test_gradients_flow_through_checkpoints_and_copies_are_apart():
    x, t, cond = NETWORKS["sd"][1]()
    grads = []
    for checkpointing in (False, True):
        unet = sd_unet().requires_grad_(False).train()
        unet.checkpointing = checkpointing
        lora.inject(unet, lora.find(unet, "all"), 2)
        scramble(unet)
        unet(x, t, cond).square().mean().backward()
        grads.append([p.grad for p in unet.parameters() if p.requires_grad])
    assert_close(*grads)
    other = copy.deepcopy(unet).eval()
    before = unet.eval()(x, t, cond)
    with torch.no_grad():
        for *_, branch in lora.branches(other):
            branch.up.weight.zero_()
    assert torch.equal(unet(x, t, cond), before) and not torch.equal(other(x, t, cond), before)  # fmt: skip


@pytest.mark.slow
def test_branches_are_compiled_with_the_network():
    """Traced as one graph with all branches, forward and backward."""
    inputs, found = NETWORKS["text"][1](), []
    for compiled in (False, True):
        model = text().requires_grad_(False)
        lora.inject(model, lora.find(model, "all"), 2)
        scramble(model)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        out = call(*inputs)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_peft_computes_the_same():
    """peft's LoRA on a network of ours, with the same weights: the same output."""
    peft = pytest.importorskip("peft", reason="needs peft (tests/requirements.txt)")
    unet, theirs, inputs = sd_unet(), sd_unet(), NETWORKS["sd"][1]()
    names = lora.find(
        unet, r"to_[qkv]|proj_|conv_shortcut|downsamplers"
    )  # peft cannot wrap Conv3x3
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False)
    wrapped = peft.inject_adapter_in_model(config, theirs)
    weights = peft.get_peft_model_state_dict(wrapped)
    low = {n: lora.LowRank(weights[f"{n}.lora_A.weight"], weights[f"{n}.lora_B.weight"], 5.0) for n in names}  # fmt: skip
    lora.load(unet, low, "peft")
    with torch.no_grad():
        assert_close(unet(*inputs), wrapped(*inputs), rtol=1e-4, atol=1e-5)
