"""LoRA on networks: identity, closed form, merging, what it may be injected into."""

import copy
import functools
import importlib

import pytest
import torch
from helpers import sd_unet
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from diffusion import UserError
from diffusion.files import adapter_files
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
    with pytest.raises(ValueError, match="'x'"):
        lora.load(again, lora.state(model), "x")


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


# --- other kinds ----------------------------------------------------------------------------------

# linear, square, 3x3, 3x3 of stride 2, 1x1
SOME = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.resnets.0.conv_shortcut",
]
NORMS = ["down_blocks.0.resnets.0.norm1", "mid_block.attentions.0.transformer_blocks.0.norm2"]
KINDS = {
    "Tucker": ("locon.LoConModule", dict(use_tucker=True)),
    "DoRA": ("locon.LoConModule", dict(weight_decompose=True)),
    "DoRA of inputs": ("locon.LoConModule", dict(weight_decompose=True, wd_on_out=False)),
    "LoHa": ("loha.LohaModule", dict(rs_lora=True)),
    "LoHa Tucker": ("loha.LohaModule", dict(use_tucker=True)),
    "LoHa DoRA": ("loha.LohaModule", dict(weight_decompose=True)),
    "LoKr": ("lokr.LokrModule", dict(factor=4)),
    "LoKr both": ("lokr.LokrModule", dict(factor=8, decompose_both=True)),
    "LoKr Tucker": ("lokr.LokrModule", dict(factor=2, use_tucker=True)),
    "LoKr full": ("lokr.LokrModule", dict(factor=4, full_matrix=True)),
    "LoKr DoRA": ("lokr.LokrModule", dict(factor=4, weight_decompose=True, wd_on_out=False)),
    "full": ("full.FullModule", {}),
    "norms": ("norms.NormModule", {}),
}  # fmt: skip


def theirs(kind, unet) -> tuple[dict, dict]:
    """(LyCORIS' modules beside layers of a network, with random weights; the file that it saves)."""
    pytest.importorskip("lycoris", reason="needs lycoris-lora (tests/requirements.txt)")
    where, options = KINDS[kind]
    module, name = where.split(".")
    made = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
    if kind not in ("full", "norms"):
        options = options | dict(alpha=3.0)
    torch.manual_seed(1)
    beside, file = {}, {}
    for i, path in enumerate(NORMS if kind == "norms" else SOME):
        layer = unet.get_submodule(path)
        if isinstance(layer, nn.Conv2d):  # it knows no subclasses
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)  # fmt: skip
            plain.load_state_dict(layer.state_dict())
            layer = plain
        rank = {} if kind in ("full", "norms") else {"lora_dim": 2 + i % 2}
        beside[path] = made(f"lora_unet_{i}", layer, 1.0, **rank, **options).eval()
        for name, p in beside[path].named_parameters():
            p.data = 0.3 * torch.randn_like(p) + ("dora" in name)
        saved = beside[path].state_dict()
        if kind == "full":
            saved = {"diff": beside[path].weight, "diff_b": beside[path].bias}
        flat = path.replace(".", "_")
        prefix = ("lora_unet_", "lycoris_unet_", "lycoris_")[i % 3]
        file |= {f"{prefix}{flat}.{k}": v.detach().clone().contiguous() for k, v in saved.items() if v is not None}  # fmt: skip
    return beside, file


same_unet = functools.cache(sd_unet)


def inputs_of(layer) -> torch.Tensor:
    width = getattr(layer, "in_channels", None) or getattr(layer, "num_channels", None)
    return torch.randn(2, width, 6, 6) if width else torch.randn(2, 3, *getattr(layer, "normalized_shape", (getattr(layer, "in_features", 0),)))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_computes_the_same(kind, tmp_path):
    """Each layer's output, merged, and beside it with 0.7 of the change."""
    unet = sd_unet()
    beside, file = theirs(kind, unet)
    save_file(file, tmp_path / "a.safetensors")
    parts = adapter_files.read_lora(tmp_path / "a.safetensors", {"unet": unet})["unet"]
    assert parts.keys() == beside.keys()
    for weight, merged in ((1.0, True), (0.7, False)):
        ours = sd_unet()
        lora.load(ours, parts, "a", weight)
        if merged:
            lora.merge(ours)
        for path, module in beside.items():
            x = inputs_of(unet.get_submodule(path))
            plain = unet.get_submodule(path)(x)
            module.org_forward = module.org_module[0].forward
            change = module.forward(x) - plain
            assert change.abs().max() > 0.05
            found = ours.get_submodule(path)(x)
            assert_close(found, plain + weight * change, rtol=1e-5, atol=2e-5)


def test_the_formulas(tmp_path):
    """Without LyCORIS: written out for a linear layer and a convolution."""
    unet = same_unet()
    linear, conv = (unet.get_submodule(SOME[i]).weight for i in (0, 2))
    draw = torch.Generator().manual_seed(0)
    r = lambda *size: torch.randn(*size, generator=draw)  # noqa: E731
    a, b, c, d, t, up, down, mid, m = r(2, 16), r(2, 16), r(2, 16), r(2, 16), r(2, 2, 3, 3), r(16, 2, 1, 1), r(2, 16, 1, 1), r(2, 2, 3, 3), r(16, 1)  # fmt: skip
    w1, w2a, w2b, u, v = r(4, 2), r(4, 3), r(3, 12), r(16, 2), r(2, 24)
    V = linear + 0.5 * u @ v
    expected = {
        "hada": (SOME[2], 2.5 * torch.einsum("ijhw,io,jn->onhw", t, a, b) * torch.einsum("ijhw,io,jn->onhw", t + 1, c, d)),
        "lokr": (SOME[0], 5 / 3 * torch.einsum("ac,bd->abcd", w1, w2a @ w2b).reshape(16, 24)),
        "mid": (SOME[2], torch.einsum("ijhw,oi,jn->onhw", mid, up[..., 0, 0], down[..., 0, 0])),
        "dora": (SOME[0], m * V / V.norm(dim=1, keepdim=True) - linear),
    }  # fmt: skip
    files = {
        "hada": {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": t, "hada_w2_a": c, "hada_w2_b": d, "hada_t2": t + 1, "alpha": torch.tensor(5.0)},
        "lokr": {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": torch.tensor([5.0])},
        "mid": {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid},
        "dora": {"lora_B.weight": u, "lora_A.weight": v, "lora_magnitude_vector": m[:, 0], "alpha": torch.tensor(1.0)},
    }  # fmt: skip
    for kind, (name, change) in expected.items():
        save_file({f"unet.{name}.{k}": x.clone() for k, x in files[kind].items()}, tmp_path / f"{kind}.safetensors")  # fmt: skip
        found = adapter_files.read_lora(tmp_path / f"{kind}.safetensors", {"unet": unet})["unet"]
        assert found.keys() == {name}
        assert_close(found[name].weight, change.detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_and_sums_of_kinds(tmp_path):
    """Beside bfloat16, in autocast, and two kinds with weights that change: their sum."""
    files = []
    for i, kind in enumerate(("LoHa", "full")):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(theirs(kind, sd_unet())[1], files[-1])
    x, t, cond = NETWORKS["sd"][1]()
    nets = {"beside": sd_unet(), "merged": sd_unet(), "half": sd_unet().bfloat16()}
    for name, unet in nets.items():
        for i, file in enumerate(files):
            lora.load(unet, adapter_files.read_lora(file, {"unet": unet})["unet"], str(i), 0.2)
        if name != "half":
            lora.set_weights(unet, {"0": 0.1, "1": -0.05})
    lora.merge(nets["merged"])
    expected = nets["merged"](x, t, cond)
    assert_close(nets["beside"](x, t, cond), expected, rtol=1e-4, atol=1e-5)
    lora.set_weights(nets["half"], {"0": 0.1, "1": -0.05})
    half = nets["half"](x.bfloat16(), t, Cond(cond.context.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        cast = nets["beside"](x, t, cond)
    assert (cast - expected).abs().max() < 0.05 * expected.abs().max()
    assert copy.deepcopy(nets["beside"])(x, t, cond).equal(nets["beside"](x, t, cond))


def refused(tensors, tmp_path, *named) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as caught:
        adapter_files.read_lora(tmp_path / "bad.safetensors", {"unet": same_unet()})
    told = str(caught.value)
    assert all(name in told for name in ("bad.safetensors", *named)), told
    assert "\n" not in told and len(told) < 700


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    """Missing factors, other shapes, giants, alphas beyond sense, two kinds on one layer."""
    key = f"lora_unet_{SOME[0].replace('.', '_')}."  # (16, 24)
    norm = f"lora_unet_{NORMS[0].replace('.', '_')}."
    hada = {f"{key}hada_w{i}_{side}": torch.ones(size) for i in (1, 2) for side, size in (("a", (16, 2)), ("b", (2, 24)))}  # fmt: skip
    kron = {f"{key}lokr_w1": torch.ones(4, 2), f"{key}lokr_w2": torch.ones(4, 12)}
    pair = {f"{key}lora_down.weight": torch.ones(2, 24), f"{key}lora_up.weight": torch.ones(16, 2)}
    vast = torch.ones(1 << 20, 1)
    refused({k: v for k, v in hada.items() if "w2_b" not in k}, tmp_path, SOME[0], "hada_w2_b")
    refused({k: v for k, v in kron.items() if "w1" not in k}, tmp_path, SOME[0], "lokr_w1_a")
    refused({k: v for k, v in pair.items() if "up" in k}, tmp_path, SOME[0], "down")
    refused(hada | {f"{key}hada_w1_a": torch.ones(17, 2)}, tmp_path, SOME[0], "(16, 24)", "hada_w1")
    refused(hada | {f"{key}hada_w1_a": torch.ones(1, 2)}, tmp_path, SOME[0])  # broadcast else
    refused(hada | {f"{key}hada_w1_a": vast, f"{key}hada_w1_b": vast.T.clone()}, tmp_path, "1048576")  # fmt: skip
    refused({f"{key}lokr_w1": vast, f"{key}lokr_w2": vast + 1}, tmp_path, "1048576")
    refused({f"{key}lokr_w1": torch.ones(2, 2), f"{key}lokr_w2": torch.ones(4, 4)}, tmp_path, "(8, 8)")  # fmt: skip
    refused({f"{key}diff": torch.ones(24, 16)}, tmp_path, SOME[0], "(24, 16)")
    refused({f"{key}diff": torch.ones(16, 24), f"{key}diff_b": torch.ones(16)}, tmp_path, "diff_b")
    refused({f"{norm}w_norm": torch.ones(15)}, tmp_path, NORMS[0], "15")
    refused(pair | {f"{key}dora_scale": torch.ones(5, 1)}, tmp_path, SOME[0])
    refused(pair | hada, tmp_path, SOME[0], "hada_w1_a")
    for alpha in (1e30, 3e38, -1e12):
        for kind in (pair, hada):
            refused(kind | {f"{key}alpha": torch.tensor(alpha)}, tmp_path, SOME[0])
    refused(pair | {f"{key}bias": torch.ones(16)}, tmp_path, "bias")
    for kind, names in {
        "OFT": ("oft_blocks", "alpha"), "IA3": ("weight", "on_input"), "VeRA": ("vera_lambda_b", "vera_lambda_d"),
        "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "AdaLoRA": ("lora_E", "lora_A"),
    }.items():  # fmt: skip
        refused({key + name: torch.ones(16) for name in names}, tmp_path, kind)
