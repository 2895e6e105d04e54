"""Tables of what the tensors of Stable Diffusion 1.x are called in original files.

Our modules are named as in Hugging Face's folders. A table maps our prefixes to theirs; a name is
translated by the longest prefix that it begins with, and by the inverted table when a file is read.
"""

from collections.abc import Iterable, Mapping

Table = dict[str, str]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut", "": ""}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# in folders that diffusers wrote before 2023, and ours
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# the beginnings of a network's names in an original single file
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.transformer.",),
}


def prefixed(ours: str, theirs: str, table: Table) -> Table:
    """Extend a table of one module to its place in the network."""
    return {f"{ours}.{a}".rstrip("."): f"{theirs}.{b}".rstrip(".") for a, b in table.items()}


def unet_table(config: Mapping) -> Table:
    """List the U-Net's names in CompVis openaimodel.py.

    There is one running number over ResBlocks, down- and upsamplers.
    """
    layers = config["layers_per_block"]
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    table |= prefixed("mid_block.resnets.0", "middle_block.0", RESNET)
    table |= prefixed("mid_block.resnets.1", "middle_block.2", RESNET)
    # conv_in is input block 0
    for way, side, count, i in (("down", "input", layers, 1), ("up", "output", layers + 1, 0)):
        for b, kind in enumerate(config[f"{way}_block_types"]):
            attends = kind.startswith("CrossAttn")
            ours = f"{way}_blocks.{b}"
            for k in range(count):
                table |= prefixed(f"{ours}.resnets.{k}", f"{side}_blocks.{i}.0", RESNET)
                if attends:
                    table[f"{ours}.attentions.{k}"] = f"{side}_blocks.{i}.1"
                i += 1
            if way == "up":
                table[f"{ours}.upsamplers.0.conv"] = f"{side}_blocks.{i - 1}.{1 + attends}.conv"
            else:
                table[f"{ours}.downsamplers.0.conv"] = f"{side}_blocks.{i}.0.op"
                i += 1
    return table


def vae_table(config: Mapping) -> Table:
    """List the VAE's names in CompVis autoencoder.py.

    Its up.i counts from the outermost level, ours from the innermost.
    """
    levels = len(config["block_out_channels"])
    table = {}
    for part, way, layers in (
        ("encoder", "down", config["layers_per_block"]),
        ("decoder", "up", config["layers_per_block"] + 1),
    ):
        table[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        for b in range(levels):
            ours = f"{part}.{way}_blocks.{b}"
            theirs = f"{part}.{way}.{b if way == 'down' else levels - 1 - b}"
            for k in range(layers):
                table |= prefixed(f"{ours}.resnets.{k}", f"{theirs}.block.{k}", VAE_RESNET)
            table[f"{ours}.{way}samplers.0"] = f"{theirs}.{way}sample"
        for k in (0, 1):
            ours = f"{part}.mid_block.resnets.{k}"
            table |= prefixed(ours, f"{part}.mid.block_{k + 1}", VAE_RESNET)
        table |= prefixed(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", VAE_ATTENTION)
    return table


def tables(part: str, config: Mapping) -> tuple[Table, Table]:
    """List a network's names: (ours to theirs, all that are known to ours)."""
    if part == "text_encoder":
        return {}, {}
    table = (unet_table if part == "unet" else vae_table)(config)
    known = {theirs: ours for ours, theirs in table.items()}
    if part == "vae":
        for name in ("encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"):
            known |= prefixed(name, name, OLD_VAE_ATTENTION)
    return table, known


def translate(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest known prefix of a name; one without such a prefix stays as it is."""
    start = name
    while start not in table and start:
        start = start.rpartition(".")[0]
    return table[start] + name.removeprefix(start) if start else name


# what a file is, by marks in the names of its tensors; the first that is found wins
FAMILIES = {
    "a LoHa": "hada_w",
    "a LoKr": "lokr_w",
    "a DoRA": "dora_scale lora_magnitude",
    "a LoRA with a Tucker core": "lora_mid",
    "an OFT or BOFT": "oft_",
    "an IA3": ".on_input ia3_l",
    "a GLoRA or GLoKr": ".a1.weight .b1.weight glokr",
    "a VeRA": "vera_lambda",
    "an AdaLoRA": ".lora_E",
    "a T-LoRA": "lambda_layer",
    "a LoRA of embeddings": "lora_embedding",
    "Stable Diffusion 3": "joint_blocks. joint_transformer_blocks",
    "a LoRA of Stable Diffusion XL": "lora_te2_ text_encoder_2. clip_g.",
    "a LoRA": "lora_up. lora_down. lora_A. .lora. lora_linear_layer to_q_lora unet:0:up",
    "a textual inversion embedding": "emb_params string_to_param",
    "a ControlNet": "control_model. controlnet_",
    "Flux": "double_blocks. single_transformer_blocks.",
    "Stable Diffusion XL": "conditioner.embedders. add_embedding. label_emb.0.0.",
    "Stable Diffusion 2": "cond_stage_model.model.transformer.",
    "Stable Cascade or Würstchen": "clf.0. effnet_mapper",
    "PixArt or another transformer": "adaln_single caption_projection",
}


def family(names: Iterable[str]) -> str | None:
    """Name what else a file is by the names of its tensors, if it is a known kind."""
    joined = "\n".join(names)
    for kind, marks in FAMILIES.items():
        if any(mark in joined for mark in marks.split()):
            return kind
    return None
