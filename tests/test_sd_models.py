"""Stable Diffusion's networks against diffusers and transformers, which are no part of the product."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from diffusion.models import cpu, vae
from diffusion.models.build import build
from diffusion.models.clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    CLIPModel,
    CLIPTextModel,
    encode_chunks,
)
from diffusion.models.cond import Cond
from diffusion.models.configs import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    UNetConfig,
    VAEConfig,
)
from diffusion.models.layers import MultiHead
from diffusion.models.sd_unet import SDUNet
from diffusion.models.vae import AutoencoderKL

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32; outputs are of the order of 1
CROSS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
ATTN = {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"}
PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}


def kinds(*levels) -> dict:
    return {"down_block_types": tuple(k["down"] for k in levels),
            "up_block_types": tuple(k["up"] for k in reversed(levels))}  # fmt: skip


TINY = UNetConfig(
    block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=12,
    sample_size=8, **kinds(CROSS, PLAIN),
)  # fmt: skip
UNETS = {  # config, (H, W) of the input
    "two levels": (TINY, (8, 8)),
    "four levels, odd sizes": (
        replace(TINY, block_out_channels=(16, 32, 48, 48), attention_head_dim=8,
                **kinds(CROSS, CROSS, CROSS, PLAIN)), (13, 10)),
    "inpainting, SD 2": (
        replace(TINY, block_out_channels=(16, 32, 32), in_channels=9, layers_per_block=1,
                attention_head_dim=(2, 4, 8), use_linear_projection=True,
                **kinds(CROSS, CROSS, CROSS)), (8, 12)),
    "classes, sin first": (
        replace(TINY, num_classes=3, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3), (6, 6)),
    "no context": (
        replace(TINY, block_out_channels=(16, 32, 32), mid_block_type="UNetMidBlock2D",
                attention_head_dim=8, **kinds(PLAIN, ATTN, ATTN)), (8, 8)),
}  # fmt: skip


def shake(model):
    """Random everywhere, norms and biases too: a swapped pair shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def twins(ours, theirs):
    """Both with the same weights, after comparing all names, shapes, and the norms' eps."""
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    for facts in (
        lambda m: {k: v.shape for k, v in m.state_dict().items()},
        lambda m: {k: v.eps for k, v in m.named_modules() if isinstance(v, norms)},
    ):
        assert facts(ours) == facts(theirs)
    ours.load_state_dict(shake(theirs).state_dict())
    return ours.eval(), theirs


def unet_inputs(config: UNetConfig, H: int = 8, W: int = 8, B: int = 2) -> dict:
    torch.manual_seed(1)
    return {
        "x": torch.randn(B, config.in_channels, H, W),
        "t": torch.tensor([3.0, 701.5])[:B],
        "cond": Cond(
            context=torch.randn(B, 5, config.cross_attention_dim),
            labels=torch.tensor([0, 3])[:B] if config.num_classes else None,
        ),
    }


def theirs_unet(config: UNetConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel.from_config(json.loads(json.dumps(config.to_dict())))


def theirs_vae(config: VAEConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL.from_config(json.loads(json.dumps(config.to_dict())))


def count(model) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), len(model.state_dict())


def test_full_size():
    with torch.device("meta"):
        unet, auto = SDUNet(UNetConfig()), AutoencoderKL(VAEConfig())
        text = CLIPTextModel(CLIPTextConfig())
    assert count(unet) == (859_520_964, 686)
    assert count(auto)[0] == 83_653_863 and count(auto.encoder)[0] == 34_163_592
    assert count(text) == (123_060_480, 196)


def test_forward_reads_nothing_from_the_device():
    """On the meta device there is nothing to read: a read raises."""
    with torch.device("meta"):
        ids = torch.zeros(2, 77, dtype=torch.long)
        context = CLIPTextModel(CLIPTextConfig())(ids)
        z = SDUNet(UNetConfig())(torch.zeros(2, 4, 40, 40), torch.zeros(2), Cond(context))
        assert AutoencoderKL(VAEConfig()).decode(z).shape == (2, 3, 320, 320)


# --- the U-Net -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNETS)
def test_unet_is_diffusers(name):
    config, size = UNETS[name]
    ours, theirs = twins(SDUNet(config), theirs_unet(config))
    x, t, cond = unet_inputs(config, *size).values()
    with torch.no_grad():
        expected = theirs(x, t, cond.context, class_labels=cond.labels).sample
        assert_close(ours(x, t, cond), expected, **CLOSE)
        fast = ours.to(memory_format=torch.channels_last)(x, t, cond)
    assert_close(fast, expected, **CLOSE)
    assert UNetConfig.from_dict(json.loads(theirs.to_json_string())) == config


def test_unet_gradients_are_diffusers():
    config = replace(TINY, layers_per_block=1)
    ours, theirs = twins(SDUNet(config), theirs_unet(config))
    x, t, cond = unet_inputs(config).values()
    context = cond.context.requires_grad_()
    grads = []
    for out, model in ((ours(x, t, cond), ours), (theirs(x, t, context).sample, theirs)):
        named = dict(model.named_parameters())
        loss = out.square().mean()
        grads.append(
            dict(zip([*named, "context"], torch.autograd.grad(loss, [*named.values(), context])))
        )
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_unet_with_the_published_config():
    """unet/config.json of Stable Diffusion 1.x as it was published, of few and of many fields."""
    old = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]],
    }  # fmt: skip
    assert UNetConfig.from_dict(old) == UNetConfig()
    newer = {**old, "addition_embed_type": None, "addition_embed_type_num_heads": 64,
             "only_cross_attention": False, "upcast_attention": None, "dropout": 0.0}  # fmt: skip
    assert UNetConfig.from_dict(newer) == UNetConfig()


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel.*supported: 'UNet2DCond"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type.*text_time"),
    ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim.*256"),
    ({"class_embed_type": "projection"}, "class_embed_type.*'projection'"),
    ({"cross_attention_dim": [768] * 4}, "cross_attention_dim is"),
    ({"cross_attention_dim": None}, "cross_attention_dim is None"),
    ({"layers_per_block": [2, 2, 2, 2]}, "layers_per_block is"),
    ({"attention_head_dim": [5, 10]}, "attention_head_dim is"),
    ({"attention_head_dim": 7}, "attention_head_dim is 7.*divisor"),
    ({"act_fn": "gelu"}, "act_fn is 'gelu'; supported: 'silu'"),
    ({"down_block_types": ["KDownBlock2D"] * 4}, "KDownBlock2D.*CrossAttnDownBlock2D"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
    ({"norm_num_groups": None}, "norm_num_groups is None"),
    ({"some_new_field": 3}, "unknown key some_new_field.*3"),
])  # fmt: skip
def test_unet_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**UNetConfig().to_dict(), **change})


def test_unet_needs_its_context():
    x, t, *_ = unet_inputs(TINY).values()
    with pytest.raises(ValueError, match=r"\(B, L, 12\), got None"):
        SDUNet(TINY)(x, t)
    config, _ = UNETS["no context"]
    assert SDUNet(config)(*list(unet_inputs(config).values())[:2]).shape == x.shape


def test_no_label_is_the_null_label():
    config, _ = UNETS["classes, sin first"]
    model = shake(SDUNet(config))
    x, t, cond = unet_inputs(config).values()
    null = cond._replace(labels=torch.full_like(cond.labels, model.null_label))
    out = model(x, t, cond._replace(labels=None))
    assert_close(out, model(x, t, null))
    assert not torch.allclose(out[:1], model(x, t, cond)[:1], atol=1e-4)


def test_unet_starts_at_zero_and_all_of_it_trains():
    """DDP waits for every parameter's gradient; each is moved within a few steps."""
    for config in (TINY, UNETS["no context"][0]):
        model = SDUNet(config)
        x, t, cond = unet_inputs(config).values()
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for i in range(4):
            out = model(x, t, cond)
            assert i or out.abs().max() == 0
            (out - x).square().mean().backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        still = [k for k, v in model.state_dict().items() if torch.equal(v, before[k])]
        assert all(k.endswith("to_k.bias") for k in still)  # a softmax does not see it


def test_new_branches_are_zero():
    for config, ends in (
        (TINY, ("conv2", "proj_out", "conv_out")),
        (UNETS["no context"][0], ("conv2", "to_out.0", "conv_out")),
    ):
        zero = {k for k, m in SDUNet(config).named_modules() if k.endswith(ends)}
        for name, module in SDUNet(config).named_modules():
            if getattr(module, "weight", None) is not None:
                assert (module.weight.abs().max() == 0) == (name in zero)


def test_checkpointing_changes_nothing_but_memory():
    x, t, cond = unet_inputs(TINY).values()
    grads, calls = [], []
    for flag in (False, True):
        torch.manual_seed(0)
        model = shake(SDUNet(TINY)).train()
        model.checkpointing = flag
        last = model.up_blocks[-1].resnets[-1]
        last.register_forward_pre_hook(lambda *_: calls.append(flag))
        model(x, t, cond).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert calls == [False, True, True]  # computed once more in backward
    for a, b in zip(*grads):
        assert_close(a, b)


def test_autocast_stays_close():
    """Forward and backward, in bfloat16."""
    model = shake(SDUNet(TINY)).to(memory_format=torch.channels_last)
    x, t, cond = unet_inputs(TINY).values()
    outs, grads = [], []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(x, t, cond)
        assert out.dtype == (torch.bfloat16 if half else torch.float32)
        outs.append(out.float())
        out.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    for full, half in (outs, grads):
        assert (half - full).norm() / full.norm() < 0.03


def test_whole_network_in_bfloat16_stays_close():
    model = shake(SDUNet(TINY))
    x, t, cond = unet_inputs(TINY).values()
    full = model(x, t, cond)
    half = model.bfloat16()(x.bfloat16(), t, Cond(cond.context.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.03


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = shake(SDUNet(replace(TINY, layers_per_block=1, num_classes=2)))
    inputs = unet_inputs(TINY).values()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("side", [6, 24])
def test_detours_of_a_cpu_are_the_same_functions(side):
    """Products of patches at the smaller size, MLPs in chunks at the larger."""
    config = replace(TINY, block_out_channels=(16, 256), num_classes=3)
    inputs = list(unet_inputs(config, side, side).values())
    fast = shake(build("unet", config)).to(memory_format=torch.channels_last)
    plain = SDUNet(config).eval()
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert_close(fast(*inputs), plain(*inputs), **CLOSE)


@pytest.mark.parametrize("N, causal", [(12, True), (12, False), (600, False)])
def test_attention_is_its_definition(N, causal):
    """Short and long rows, which a CPU trains in different precisions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, N, 64).requires_grad_() for _ in range(3))
    heads = [x.unflatten(2, (2, 32)).transpose(1, 2) for x in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(2, 3) * 32**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(N, N).tril() == 0, -torch.inf)
    expected = (scores.softmax(3) @ heads[2]).transpose(1, 2).flatten(2)
    for layer in (MultiHead(2, causal), cpu.install(MultiHead(2, causal))):
        assert_close(layer.attend(q, k, v), expected, **CLOSE)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer.attend(*(x.bfloat16() for x in (q, k, v)))
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), expected, rtol=0.03, atol=0.03)


# --- the VAE -------------------------------------------------------------------------------------

SMALL = VAEConfig(block_out_channels=(16, 32, 32), norm_num_groups=8, layers_per_block=1)
VAES = {
    "three levels": (SMALL, (24, 32)),
    "SD, odd sizes": (
        VAEConfig(block_out_channels=(8, 16, 32, 32), norm_num_groups=4), (43, 30)),
    "no 1x1, one channel": (
        replace(SMALL, latent_channels=8, in_channels=1, out_channels=1, use_quant_conv=False,
                use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.3), (16, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_vae_is_diffusers(name):
    config, size = VAES[name]
    ours, theirs = twins(AutoencoderKL(config), theirs_vae(config))
    x = torch.randn(2, config.in_channels, *size)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        assert_close(mean, expected.mean, **CLOSE)
        assert_close(logvar, expected.logvar, **CLOSE)
        assert_close(ours.decode(mean), theirs.decode(mean).sample, **CLOSE)
    assert VAEConfig.from_dict(json.loads(theirs.to_json_string())) == config


def test_vae_latents():
    model = shake(AutoencoderKL(SMALL))
    x, f = torch.randn(2, 3, 16, 16), model.factor
    with torch.no_grad():
        model.quant_conv.bias[4] += 100
        model.quant_conv.bias[5] -= 100
        mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 4, 16 // f, 16 // f)
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    eps = torch.randn_like(mean)
    assert_close(vae.sample(mean, logvar, eps), mean + logvar.exp().sqrt() * eps)
    shifted = AutoencoderKL(VAES["no 1x1, one channel"][0])
    assert_close(shifted.scale(mean), (mean - 0.1) * 0.3)
    for m in (model, shifted):
        assert_close(m.unscale(m.scale(mean)), mean)
    assert_close(model.scale(mean), mean * 0.18215)


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ({"act_fn": "relu"}, "act_fn"),
    ({"latents_mean": [0.1]}, "latents_mean"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention"),
    ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
])  # fmt: skip
def test_vae_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict({**SMALL.to_dict(), **change})


def test_vae_with_the_published_config():
    """Its defaults where the file says nothing are diffusers', not Stable Diffusion's."""
    c = VAEConfig.from_dict({"_class_name": "AutoencoderKL", "sample_size": [8, 8]})
    assert (c.block_out_channels, c.layers_per_block, c.sample_size) == ((64,), 1, (8, 8))
    assert VAEConfig.from_dict({**VAEConfig().to_dict(), "force_upcast": True}) == VAEConfig()


@pytest.mark.slow
def test_vae_trains():
    """One step from a small random one lowers its loss, with every parameter in it."""
    torch.manual_seed(0)
    model, x = AutoencoderKL(SMALL), torch.randn(2, 3, 16, 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(3):
        mean, logvar = model.encode(x)
        z = vae.sample(mean, logvar, torch.randn_like(mean))
        losses.append((model.decode(z) - x).square().mean())
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]


def test_slices_are_the_batch():
    model, z = shake(AutoencoderKL(SMALL)), torch.randn(3, 4, 4, 4)
    sizes = []
    model.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with torch.no_grad():
        assert_close(model.decode(z), model.decode(z, slicing=True), **CLOSE)
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("H, W", [(16, 16), (17, 45), (40, 5), (64, 16)])
@pytest.mark.parametrize("unit_in, unit_out", [(1, 4), (4, 1)])
def test_tiles_of_a_pointwise_function_are_the_whole(H, W, unit_in, unit_out):
    """The weights sum to 1 and every tile lands where it was cut out."""
    x = torch.randn(2, 3, H * unit_in, W * unit_in)
    if unit_in == 1:
        run = lambda x: F.interpolate(x, scale_factor=4.0) ** 3
    else:
        run = lambda x: F.avg_pool2d(x, 4) ** 3
    assert_close(vae.tiled(run, x, 16, unit_in, unit_out), run(x), **CLOSE)


def test_tiles_blend_linearly():
    """Two tiles of 0 and 1 become a ramp over the quarter that they share."""
    starts = [start for start, _ in vae.cuts(45, 16, 1, torch.device("cpu"))]
    assert starts == [0, 12, 24, 29]  # the last one ends where the side ends
    values = iter([0.0, 1.0])
    out = vae.tiled(lambda x: torch.full_like(x, next(values)), torch.zeros(1, 1, 8, 14), 8, 1, 1)
    ramp = [0.0] * 6 + [0.25, 0.75] + [1.0] * 6
    assert_close(out, torch.tensor(ramp).expand(1, 1, 8, 14))


def test_tiled_vae_is_close_to_the_whole():
    """Within 5 % in the tiles' interiors, where only the norms' statistics differ."""
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1)
    model, seen = shake(AutoencoderKL(config)), []
    for net in (model.encoder, model.decoder):
        net.register_forward_pre_hook(lambda _, args: seen.append(max(args[0].shape[2:])))
    torch.manual_seed(2)
    z, x = torch.randn(1, 4, 48, 80), torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        whole, tiles = model.decode(z), model.decode(z, tile=32)
        pairs = [(whole[..., 20:28, 20:28], tiles[..., 20:28, 20:28])]
        assert tiles.shape == whole.shape and seen[1:] == [32] * 6
        seen.clear()
        whole, tiles = model.encode(x)[0], model.encode(x, tile=32)[0]
        pairs += [(whole[..., 10:14, 10:14], tiles[..., 10:14, 10:14])]
        assert tiles.shape == whole.shape and seen[1:] == [64] * 6
        assert_close(model.decode(z, tile=80), model.decode(z), **CLOSE)  # one tile
    for a, b in pairs:
        assert (a - b).norm() / a.norm() < 0.05


# --- CLIP ----------------------------------------------------------------------------------------

TEXT = CLIPTextConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=60,
    max_position_embeddings=12, eos_token_id=50,
)  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    image_size=12, patch_size=4,
)  # fmt: skip
BOS = 49


def prompts(*lengths: int, L: int = 12) -> torch.Tensor:
    """BOS, ids below it, EOS and padding with EOS."""
    torch.manual_seed(3)
    rows = [[BOS, *torch.randint(0, BOS, (n,)).tolist()] for n in lengths]
    return torch.tensor([row + [TEXT.eos_token_id] * (L - len(row)) for row in rows])


def theirs_text(config: CLIPTextConfig):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_dict())).eval()


def named_alike(theirs):
    """transformers 5 leaves out the prefix that files have: put it in."""
    wrapped = torch.nn.Module()
    wrapped.text_model = getattr(theirs, "text_model", theirs)
    return wrapped


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_model_is_transformers(act):
    config = replace(TEXT, hidden_act=act, layer_norm_eps=1e-3)
    theirs = theirs_text(config)
    ours, _ = twins(CLIPTextModel(config), named_alike(theirs))
    ids = prompts(4, 10)
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
        assert_close(ours(ids), out.last_hidden_state, **CLOSE)
        for skip in (1, 2, 3):
            expected = ours.text_model.final_layer_norm(out.hidden_states[-skip])
            assert_close(ours(ids, skip=skip), expected, **CLOSE)
        assert_close(ours.text_model.pool(ours(ids), ids), out.pooler_output, **CLOSE)
        assert_close(ours(ids[:, :7]), ours(ids)[:, :7], **CLOSE)  # causal, any shorter length
    assert CLIPTextConfig.from_dict(theirs.config.to_diff_dict()) == config
    for skip in (0, 4):
        with pytest.raises(ValueError, match=f"skip is {skip}"):
            ours(ids, skip=skip)


def test_pooled_is_at_the_first_eos_not_at_the_highest_id():
    model = shake(CLIPTextModel(TEXT))
    ids = prompts(4, 9)
    ids[0, 2] = 58  # a token that was added after EOS
    with torch.no_grad():
        hidden = model(ids)
        assert_close(model.text_model.pool(hidden, ids), hidden[[0, 1], [5, 10]])


def test_token_embedding_can_be_extended():
    model, ids = shake(CLIPTextModel(TEXT)), prompts(4)
    table = model.text_model.embeddings.token_embedding
    longer = torch.nn.Embedding(62, 32)
    longer.weight.data[:60] = table.weight.data
    before = model(ids)
    model.text_model.embeddings.token_embedding = longer
    assert_close(model(ids), before)
    assert not torch.allclose(model(ids.masked_fill(ids < BOS, 61)), before)


def test_long_prompts_are_joined_as_kohya_does():
    model = shake(CLIPTextModel(TEXT))
    ids = torch.stack([prompts(10, 10, 3), prompts(10, 6, 0)])  # (B, n, L)
    with torch.no_grad():
        out = encode_chunks(model, ids, skip=2)
        rows = [model(ids[:, i], skip=2) for i in range(3)]
        assert_close(encode_chunks(model, ids[:, :1]), model(ids[:, 0]))
    assert out.shape == (2, 3 * 10 + 2, 32)
    expected = torch.cat([rows[0][:, :1], *(row[:, 1:11] for row in rows), rows[2][:, 11:]], 1)
    assert_close(out, expected)


def test_clip_text_configs():
    published = {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0,
        "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "torch_dtype": "float32", "vocab_size": 49408,
    }  # fmt: skip
    assert CLIPTextConfig.from_dict(published) == CLIPTextConfig()
    for change, message in [
        ({"architectures": ["CLIPTextModelWithProjection"]}, "WithProjection"),
        ({"model_type": "t5"}, "'t5'; supported: 'clip_text_model'"),
        ({"hidden_act": "relu"}, "relu.*quick_gelu or gelu"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            CLIPTextConfig.from_dict({**published, **change})


@pytest.fixture(scope="module")
def both_clips():
    transformers = pytest.importorskip("transformers")
    config = CLIPConfig(TEXT, replace(VISION, hidden_act="gelu"), 20)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_dict())).eval()
    assert CLIPConfig.from_dict(json.loads(theirs.config.to_json_string())) == config
    return twins(CLIPModel(config), theirs)


def test_both_towers_are_transformers(both_clips):
    ours, theirs = both_clips
    ids, pixels = prompts(4, 9, 1), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
        text, image = ours.text_features(ids), ours.image_features(pixels)
        assert_close(text, out.text_embeds, **CLOSE)
        assert_close(image, out.image_embeds, **CLOSE)
        logits = ours.logit_scale.exp() * image @ text.T
        assert_close(logits, out.logits_per_image, rtol=1e-4, atol=1e-4)


def test_what_a_clip_file_leaves_out_is_transformers_default():
    transformers = pytest.importorskip("transformers")
    brief = {"model_type": "clip", "text_config": {"num_hidden_layers": 2}, "vision_config": {}}
    c, theirs = CLIPConfig.from_dict(brief), transformers.CLIPConfig(**brief)
    assert c.projection_dim == theirs.projection_dim
    for a, b in ((c.text, theirs.text_config), (c.vision, theirs.vision_config)):
        assert {k: getattr(b, k) for k in vars(a)} == vars(a)
    twice = {**brief, "text_config_dict": {"hidden_size": 16}}
    assert CLIPConfig.from_dict(twice).text.hidden_size == 16
    with pytest.raises(ValueError, match="'siglip'"):
        CLIPConfig.from_dict({"model_type": "siglip"})


def test_image_normalisation_is_clips():
    transformers = pytest.importorskip("transformers")
    utils = transformers.image_utils
    assert list(IMAGE_MEAN) == utils.OPENAI_CLIP_MEAN and list(IMAGE_STD) == utils.OPENAI_CLIP_STD
