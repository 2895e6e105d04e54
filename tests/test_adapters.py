"""Adapter files against peft and diffusers: what they write we read, what we write they read."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from diffusion import UserError
from diffusion.files import adapter_files as adapters
from diffusion.files import embedding_files as embeddings
from diffusion.models import lora
from diffusion.sampling.load import open_pipeline

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
transformers = pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")  # fmt: skip
peft = pytest.importorskip("peft", reason="needs peft (tests/requirements.txt)")
from diffusers_models import make_pipeline, our_latents, their_latents  # noqa: E402

CPU = torch.device("cpu")
EPS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
PROMPT = ["a red fox"]
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "downsamplers.0.conv"]  # fmt: skip
TEXT = ["q_proj", "v_proj", "fc1"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(diffusers' pipeline, its folder)."""
    return make_pipeline(tmp_path_factory.mktemp("base"), "small")


def theirs_again(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_theirs(pipeline, prompt=PROMPT):
    return their_latents(pipeline, "ddim", EPS, 3, prompt=prompt, guidance_scale=3.0)


def draw_ours(folder, prompt=PROMPT, **options):
    pipeline = open_pipeline(None, str(folder), "ema", CPU, amp="no", **options)
    return our_latents(pipeline, "ddim", EPS, 3, prompts=prompt, guidance_scale=3.0)


@pytest.fixture(scope="module")
def trained(theirs, tmp_path_factory):
    """A LoRA of peft on diffusers' networks, alpha not the rank: (pipeline, latents, file)."""
    folder = tmp_path_factory.mktemp("peft")
    pipeline = theirs_again(theirs[1])
    torch.manual_seed(3)
    for network, targets in ((pipeline.unet, UNET), (pipeline.text_encoder, TEXT)):
        network.add_adapter(peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False,
            alpha_pattern={"proj_in": 2}, rank_pattern={"conv1": 2},
        ))  # fmt: skip
    layers = {f"{part}_lora_layers": peft.get_peft_model_state_dict(getattr(pipeline, part)) for part in ("unet", "text_encoder")}  # fmt: skip
    metadata = {f"{part}_lora_adapter_metadata": getattr(pipeline, part).peft_config["default"].to_dict() for part in ("unet", "text_encoder")}  # fmt: skip
    metadata = {k: {n: list(x) if isinstance(x, set) else x for n, x in v.items()} for k, v in metadata.items()}  # fmt: skip
    pipeline.save_lora_weights(folder, **layers, **metadata)
    return pipeline, draw_theirs(pipeline), folder / "pytorch_lora_weights.safetensors"


def networks(folder):
    pipeline = open_pipeline(None, str(folder), "ema", CPU, amp="no")
    return pipeline.networks


# --- theirs, read by us ---------------------------------------------------------------------------


def test_what_peft_and_diffusers_save(theirs, trained):
    """Same noise, same latents, merged and beside; and it is not the base's picture."""
    _, expected, file = trained
    found = draw_ours(theirs[1], loras=[(file, 1.0)])
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_close(draw_ours(theirs[1], loras=[(file, 1.0)], merged=False), expected, rtol=1e-4, atol=1e-4)  # fmt: skip
    assert (draw_ours(theirs[1]) - expected).abs().max() > 0.1


def test_several_with_weights(theirs, trained, tmp_path):
    """As peft sums two adapters, 0.7 of one and -0.4 of the other."""
    folder = theirs[1]
    parts = adapters.read_lora(trained[2], networks(folder))
    torch.manual_seed(5)
    other = {"unet": {n: low._replace(down=torch.randn_like(low.down) / 5, alpha=2.0) for n, low in parts["unet"].items()}}  # fmt: skip
    adapters.write_diffusers(tmp_path / "b.safetensors", other)
    pipeline = theirs_again(folder)
    for name, file in (("a", trained[2]), ("b", tmp_path / "b.safetensors")):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.7, -0.4])
    found = draw_ours(folder, loras=[(trained[2], 0.7), (tmp_path / "b.safetensors", -0.4)])
    assert_close(found, draw_theirs(pipeline), rtol=1e-4, atol=1e-4)


def spellings(tensors: dict) -> dict[str, dict]:
    """One file of peft's names in every other spelling; alphas are the ranks there."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    out = {"peft": tensors, "diffusers": {}, "in memory": {}}
    for name, value in tensors.items():
        out["in memory"][name.replace(".weight", ".default.weight")] = value
        kind = "down" if "lora_A" in name else "up"
        layer = name.split(".lora_")[0]
        middle = "lora_linear_layer" if name.startswith("text") else "lora"
        out["diffusers"][f"{layer}.{middle}.{kind}.weight"] = value
    text = convert_state_dict_to_diffusers({k: v for k, v in tensors.items() if "self_attn" in k})  # fmt: skip
    assert text and text.keys() <= out["diffusers"].keys()
    out["kohya"] = convert_state_dict_to_kohya(dict(tensors))
    assert all(k.startswith(("lora_unet_", "lora_te")) for k in out["kohya"])
    return out


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "in memory", "kohya"])
def test_every_spelling(theirs, trained, tmp_path, spelling):
    """Without alphas the scale is 1: as diffusers draws it from a file without metadata."""
    tensors = {k: v for k, v in load_file(trained[2]).items() if "conv" not in k}
    save_file(tensors, tmp_path / "plain.safetensors")
    pipeline = theirs_again(theirs[1])
    pipeline.load_lora_weights(str(tmp_path), weight_name="plain.safetensors")
    save_file({k: v.contiguous() for k, v in spellings(tensors)[spelling].items()}, tmp_path / "x.safetensors")  # fmt: skip
    found = draw_ours(theirs[1], loras=[(tmp_path / "x.safetensors", 1.0)])
    assert_close(found, draw_theirs(pipeline), rtol=1e-4, atol=1e-4)


def test_attention_processors_of_2023(theirs, tmp_path):
    """The oldest spelling, of the U-Net alone, with and without its prefix; a .bin too."""
    known = networks(theirs[1])
    layers, tensors = lora.layers(known["unet"]), {}
    torch.manual_seed(0)
    for name, layer in layers.items():
        if "attn1.to_" in name:
            block, leaf = name.split(".to_")
            key = f"{block}.processor.to_{leaf.removesuffix('.0')}_lora"
            tensors[f"{key}.down.weight"] = torch.randn(2, layer.in_features) / 5
            tensors[f"{key}.up.weight"] = torch.randn(layer.out_features, 2) / 5
    save_file({f"unet.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.bin")
    pipeline = theirs_again(theirs[1])
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    expected = draw_theirs(pipeline)
    assert (draw_ours(theirs[1]) - expected).abs().max() > 0.01
    for file in ("a.safetensors", "b.bin"):
        assert_close(draw_ours(theirs[1], loras=[(tmp_path / file, 1.0)]), expected, rtol=1e-4, atol=1e-4)  # fmt: skip


def test_peft_folder(theirs, tmp_path):
    """alpha, its pattern and rank-stabilised scaling from adapter_config.json."""
    pipeline = theirs_again(theirs[1])
    torch.manual_seed(3)
    wrapped = peft.PeftModel(pipeline.unet, peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False,
        use_rslora=True, alpha_pattern={"conv2": 7}, rank_pattern={"to_v": 2},
    ))  # fmt: skip
    wrapped.save_pretrained(tmp_path)
    expected = draw_theirs(pipeline)
    assert_close(draw_ours(theirs[1], loras=[(tmp_path, 1.0)]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, options", [
    ("LoHaConfig", dict(alpha=6, use_effective_conv2d=True, alpha_pattern={"to_q": 2})),
    pytest.param("LoHaConfig", dict(alpha=2), marks=pytest.mark.slow),
    ("LoKrConfig", dict(alpha=6, rank_pattern={"to_q": 2, "to_v": 40}, decompose_both=True, decompose_factor=8)),
    pytest.param("LoKrConfig", dict(alpha=2, use_effective_conv2d=True), marks=pytest.mark.slow),
    ("LoraConfig", dict(lora_alpha=6, use_dora=True)),
], ids=["loha tucker", "loha", "lokr", "lokr tucker", "dora"])  # fmt: skip
def test_other_kinds_of_peft(theirs, tmp_path, kind, options):
    """Of a folder that peft saves, of linear layers and convolutions: same noise, same latents."""
    pipeline = theirs_again(theirs[1])
    torch.manual_seed(3)
    config = getattr(peft, kind)(r=3, target_modules=["to_q", "to_v", "conv2", "proj_in"], **options)  # fmt: skip
    wrapped = peft.get_peft_model(pipeline.unet, config)
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            p.data = p.data * 1.2 if "magnitude" in name else torch.randn_like(p) / 3
    wrapped.save_pretrained(tmp_path)
    expected = draw_theirs(pipeline)
    assert (draw_ours(theirs[1]) - expected).abs().max() > 0.01
    assert_close(draw_ours(theirs[1], loras=[(tmp_path, 1.0)]), expected, rtol=1e-4, atol=1e-4)


def cloneofsimo(network, classes, kinds=nn.Linear) -> list[nn.Module]:
    """The layers that lora_diffusion's _find_modules finds, in its order."""
    above = [m for m in network.modules() if type(m).__name__ in classes]
    return [m for module in above for m in module.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("made", ["of 2022", "both", *(pytest.param(n, marks=pytest.mark.slow) for n in ("of today", "attention", "extended", "text"))])  # fmt: skip
def test_cloneofsimo_s_files(theirs, tmp_path, made):
    """W + up down for each layer in turn; .pt of one network, .safetensors of both, with tokens."""
    pipeline = theirs_again(theirs[1])
    torch.manual_seed(0)
    layers = {"unet": [], "text_encoder": []}
    if made == "extended":
        layers["unet"] = cloneofsimo(pipeline.unet, {"ResnetBlock2D", "Attention", "GEGLU"}, nn.Linear | nn.Conv2d)  # fmt: skip
    elif made != "text":
        layers["unet"] = cloneofsimo(pipeline.unet, {"Attention", "GEGLU"} - ({"GEGLU"} if made == "attention" else set()))  # fmt: skip
    if made in ("text", "both"):
        layers["text_encoder"] = cloneofsimo(pipeline.text_encoder, {"CLIPAttention"})
    if made == "of 2022":  # BasicTransformerBlock had its feed-forward layer before attn2
        layers["unet"] = [layers["unet"][i + j] for i in range(0, len(layers["unet"]), 9) for j in (0, 1, 2, 3, 8, 4, 5, 6, 7)]  # fmt: skip
    weights = {}
    for part, found in layers.items():
        for i, layer in enumerate(found):
            W = layer.weight.data
            up = (torch.randn(len(W), 2, *[1] * (W.ndim - 2)) / 4).half()
            down = (torch.randn(2, *W.shape[1:]) / 4).half()
            layer.weight.data = W + (up.float().flatten(1) @ down.float().flatten(1)).view_as(W)
            weights |= {f"{part}:{i}:up": up, f"{part}:{i}:down": down}
    file = tmp_path / "a.pt"
    prompt = PROMPT
    if made == "both":
        file = tmp_path / "a.safetensors"
        token = torch.randn(32, generator=torch.Generator().manual_seed(1))
        marks = {"unet": '["GEGLU", "Attention"]', "unet:0:rank": "2", "<s1>": "<embed>"}
        save_file(weights | {"<s1>": token}, file, metadata=marks)
        prompt = ["a red <s1>"]
        torch.save({"<s1>": token}, tmp_path / "ti.bin")
        pipeline.load_textual_inversion(str(tmp_path), weight_name="ti.bin")
    else:
        torch.save(list(weights.values()), file)
    expected = draw_theirs(pipeline, prompt)
    assert_close(draw_ours(theirs[1], prompt, loras=[(file, 1.0)]), expected, rtol=1e-4, atol=1e-4)
    assert (draw_ours(theirs[1]) - expected).abs().max() > 0.01
    if made == "both":
        short = {k: v for k, v in weights.items() if k != "unet:3:down"}
        save_file(short, tmp_path / "short.safetensors")
        with pytest.raises(UserError, match="short.safetensors .*U-Net"):
            draw_ours(theirs[1], loras=[(tmp_path / "short.safetensors", 1.0)])


def test_folders(theirs, trained, tmp_path):
    """A file by any name, if it is the only one; else they are named."""
    (tmp_path / "._lora.safetensors").write_bytes(b"of a Mac")
    (tmp_path / "fox.safetensors").write_bytes(trained[2].read_bytes())
    known = networks(theirs[1])
    found = adapters.read_lora(tmp_path, known)
    assert found["unet"].keys() == adapters.read_lora(trained[2].parent, known)["unet"].keys()
    (tmp_path / "wolf.safetensors").write_bytes(trained[2].read_bytes())
    with pytest.raises(UserError, match=f"{tmp_path} .*fox.safetensors, wolf.safetensors"):
        adapters.read_lora(tmp_path, known)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(trained[2].read_bytes())
    adapters.read_lora(tmp_path, known)
    with pytest.raises(UserError, match="adapter.safetensors"):
        adapters.read_lora(theirs[1], known)


def test_block_names_of_original_files(theirs):
    """CompVis' numbers, written out for this network (one ResBlock a level, two levels)."""
    known = adapters._layer_names(networks(theirs[1]))
    for theirs_name, ours in {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "lora_unet_input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "lora_unet_output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_0_proj": "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
        "diffusion_model.output_blocks.3.1.proj_out": "up_blocks.1.attentions.1.proj_out",
    }.items():  # fmt: skip
        assert adapters._find(theirs_name, known) == ("unet", ours)
    found = adapters._find("lora_te_text_model_encoder_layers_1_mlp_fc1", known)
    assert found == ("text_encoder", "text_model.encoder.layers.1.mlp.fc1")


def test_alpha_rules(theirs, tmp_path):
    """In the file; 0 or missing: the rank."""
    known = networks(theirs[1])
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": torch.ones(4, 64), f"{flat}.lora_up.weight": torch.ones(64, 4)}  # fmt: skip
    for alpha, expected in ((None, 4), (torch.tensor(0.0), 4), (torch.tensor(1.5), 1.5), (torch.tensor([2.0]), 2)):  # fmt: skip
        save_file(tensors | ({} if alpha is None else {f"{flat}.alpha": alpha}), tmp_path / "a.safetensors")  # fmt: skip
        assert adapters.read_lora(tmp_path / "a.safetensors", known)["unet"][layer].alpha == expected  # fmt: skip
    # a linear layer's weights for a 1x1 convolution, and in half precision
    conv = "mid_block.attentions.0.proj_in"
    save_file({f"unet.{conv}.lora_A.weight": torch.ones(2, 64).half(), f"unet.{conv}.lora_B.weight": torch.ones(64, 2).half()}, tmp_path / "b.safetensors")  # fmt: skip
    low = adapters.read_lora(tmp_path / "b.safetensors", known)["unet"][conv]
    assert low.down.shape == (2, 64, 1, 1) and low.down.dtype == torch.float32


# --- ours, read by them ---------------------------------------------------------------------------


@pytest.mark.parametrize("write", [adapters.write_diffusers, adapters.write_kohya], ids=["diffusers", "kohya"])  # fmt: skip
@pytest.mark.parametrize(
    "targets", ["attention", "attention,mlp,conv", r"attn2\.to_[kv]|layers.1.self_attn.out_proj"]
)
def test_diffusers_reads_ours(theirs, tmp_path, write, targets):
    """load_lora_weights: alpha is not the rank; U-Net and text encoder; our own reader too."""
    known, parts = networks(theirs[1]), {}
    for part, network in known.items():
        torch.manual_seed(7)
        lora.inject(network, lora.find(network, targets), 3, 2.0)
        for *_, branch in lora.branches(network):
            nn.init.normal_(branch.up.weight, std=0.3)
        parts[part] = lora.state(network)
    write(tmp_path / "ours.safetensors", parts)
    pipeline = theirs_again(theirs[1])
    pipeline.load_lora_weights(str(tmp_path), weight_name="ours.safetensors")
    expected = draw_theirs(pipeline)
    found = draw_ours(theirs[1], loras=[(tmp_path / "ours.safetensors", 1.0)])
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (draw_ours(theirs[1]) - expected).abs().max() > 0.01


# --- textual inversion ----------------------------------------------------------------------------


def test_textual_inversion_files(theirs, tmp_path):
    """Four layouts mean the same vectors; diffusers reads ours and draws the same."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    save_file({"<fox>": vectors}, tmp_path / "a.safetensors")
    torch.save({"<fox>": vectors}, tmp_path / "a.bin")
    save_file({"emb_params": vectors}, tmp_path / "<fox>.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "<fox>", "step": 3}, tmp_path / "b.pt")  # fmt: skip
    torch.save({"string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)}), "name": "<fox>"}, tmp_path / "c.pt")  # fmt: skip
    torch.save(vectors, tmp_path / "<fox>.pt")
    embeddings.write_diffusers(tmp_path / "ours.safetensors", "<fox>", vectors)
    embeddings.write_a1111(tmp_path / "ours_a1111.safetensors", "<fox>", vectors)
    for file in tmp_path.iterdir():
        found = embeddings.read_embedding(file, 32)
        assert found.keys() == {"<fox>"} and torch.equal(found["<fox>"], vectors), file.name
    pipeline = theirs_again(theirs[1])
    pipeline.load_textual_inversion(str(tmp_path), weight_name="ours.safetensors")
    prompt = ["a painting of <fox>, red"]
    expected = draw_theirs(pipeline, prompt)
    found = draw_ours(theirs[1], prompt, embeddings=[tmp_path / "b.pt"])
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - draw_ours(theirs[1], prompt)).abs().max() > 0.01


# --- what is refused ------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_wrong_files(theirs, trained, tmp_path, capsys):
    folder = theirs[1]
    known = networks(folder)
    tensors = load_file(trained[2])
    wide = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}
    deep = {k.replace("blocks.0", "blocks.7"): v for k, v in tensors.items() if "blocks.0" in k}
    sdxl = {f"lora_te2_text_model_encoder_layers_{i}_mlp_fc1.lora_{k}.weight": torch.ones(1, 1) for i in range(9) for k in ("down", "up")}  # fmt: skip
    for name, content, told in (
        ("wide", wide, r"for another architecture: .*\d\) in this network.* lora of"),
        ("deep", deep, "of its .* layers are not in this model"),
        ("sdxl", sdxl, "Stable Diffusion XL"),
        ("loha", {"lora_unet_x.hada_w1_a": torch.ones(1)}, "lora_unet_x"),
        ("dora", tensors | {"unet.x.lora_magnitude_vector.weight": torch.ones(1)}, "unet.x"),
        ("embedding", {"emb_params": torch.ones(1, 32)}, "textual inversion embedding; give it with --embedding"),
        ("other", {"x": torch.ones(1)}, "holds no LoRA: it has x"),
        ("nan", {k: v * float("nan") for k, v in tensors.items()}, "holds NaN or infinity in"),
        ("rank 0", {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors.items()}, "down, up"),
        ("scalars", {k: torch.ones(()) for k in tensors}, "down, up"),
        ("alpha", tensors | {k.replace("lora_A.weight", "alpha"): torch.tensor(float("nan")) for k in tensors if "lora_A" in k}, "holds NaN or infinity in"),
    ):  # fmt: skip
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=told) as caught:
            adapters.read_lora(tmp_path / f"{name}.safetensors", known)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none.safetensors"):
        adapters.read_lora(tmp_path / "none.safetensors", known)
    (tmp_path / "run.bin").write_bytes(pickle.dumps(Malicious()))
    for read in (
        lambda p: adapters.read_lora(p, known),
        lambda p: embeddings.read_embedding(p, 32),
    ):
        with pytest.raises(UserError, match="run.bin"):
            read(tmp_path / "run.bin")
    assert "this must not run" not in capsys.readouterr().out
    # a single strange layer: half a file is not applied
    save_file(tensors | {"unet.nothing.lora_A.weight": torch.ones(1, 1), "unet.nothing.lora_B.weight": torch.ones(1, 1)}, tmp_path / "few.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="1 of its .* unet.nothing"):
        adapters.read_lora(tmp_path / "few.safetensors", known)
    assert "warning" not in capsys.readouterr().out
    # textual inversions
    save_file({"<a>": torch.ones(1, 33)}, tmp_path / "33.safetensors")
    with pytest.raises(UserError, match="'<a>' is 33 wide, this one's is 32"):
        embeddings.read_embedding(tmp_path / "33.safetensors", 32)
    with pytest.raises(UserError, match="LoRA"):
        embeddings.read_embedding(trained[2], 32)
    with pytest.raises(UserError, match="x.pt"):
        torch.save({"a": 1}, tmp_path / "x.pt")
        embeddings.read_embedding(tmp_path / "x.pt", 32)
