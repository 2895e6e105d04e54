"""What the tensors of Stable Diffusion 1.x are called, as tables.

Our modules are named as in Hugging Face's folders. A table is a list of (our prefix, theirs): a
name is translated by the longest prefix that fits it, and by the table read backwards when an
original file is written.
"""

from collections.abc import Mapping

Table = list[tuple[str, str]]

RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
VAE_RESNET = [("conv_shortcut", "nin_shortcut"), ("", "")]
VAE_ATTENTION = [
    ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
]  # fmt: skip
# files from before 2023 name the VAE's attention so
OLD_ATTENTION = [
    ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"),
]  # fmt: skip
# where the parts of an original single file begin
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.transformer.",),
}


def inside(ours: str, theirs: str, table: Table) -> Table:
    """A table for the parts of one module."""
    return [(join(ours, a), join(theirs, b)) for a, b in table]


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix


def unet_table(config: Mapping) -> Table:
    """CompVis openaimodel.py: one running number over ResBlocks, down- and upsamplers."""
    down = config["down_block_types"]
    up = config["up_block_types"]
    L = config["layers_per_block"]
    n = len(config["block_out_channels"])
    table = [
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("class_embedding", "label_emb"), ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ]  # fmt: skip
    i = 1
    for b in range(n):
        for k in range(L):
            table += inside(f"down_blocks.{b}.resnets.{k}", f"input_blocks.{i}.0", RESNET)
            if down[b].startswith("CrossAttn"):
                table.append((f"down_blocks.{b}.attentions.{k}", f"input_blocks.{i}.1"))
            i += 1
        if b < n - 1:
            table.append((f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{i}.0.op"))
            i += 1
    table += inside("mid_block.resnets.0", "middle_block.0", RESNET)
    table.append(("mid_block.attentions.0", "middle_block.1"))
    table += inside("mid_block.resnets.1", "middle_block.2", RESNET)
    i = 0
    for b in range(n):
        attends = up[b].startswith("CrossAttn")
        for k in range(L + 1):
            table += inside(f"up_blocks.{b}.resnets.{k}", f"output_blocks.{i}.0", RESNET)
            if attends:
                table.append((f"up_blocks.{b}.attentions.{k}", f"output_blocks.{i}.1"))
            i += 1
        if b < n - 1:
            last = f"output_blocks.{i - 1}.{2 if attends else 1}.conv"
            table.append((f"up_blocks.{b}.upsamplers.0.conv", last))
    return table


def vae_table(config: Mapping) -> Table:
    """CompVis autoencoder: up.i counts from the outermost level, ours from the innermost."""
    L = config["layers_per_block"]
    n = len(config["block_out_channels"])
    table = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for part, layers, blocks, level, resample in (
        ("encoder", L, "down_blocks", "down", "downsample"),
        ("decoder", L + 1, "up_blocks", "up", "upsample"),
    ):
        table += [(f"{part}.conv_in", f"{part}.conv_in"), (f"{part}.conv_out", f"{part}.conv_out"),
                  (f"{part}.conv_norm_out", f"{part}.norm_out")]  # fmt: skip
        for b in range(n):
            ours = f"{part}.{blocks}.{b}"
            theirs = f"{part}.{level}.{b if part == 'encoder' else n - 1 - b}"
            for k in range(layers):
                table += inside(f"{ours}.resnets.{k}", f"{theirs}.block.{k}", VAE_RESNET)
            if b < n - 1:  # downsamplers, upsamplers
                table.append((f"{ours}.{resample}rs.0", f"{theirs}.{resample}"))
        ours = f"{part}.mid_block"
        theirs = f"{part}.mid"
        for k in (0, 1):
            table += inside(f"{ours}.resnets.{k}", f"{theirs}.block_{k + 1}", VAE_RESNET)
        table += inside(f"{ours}.attentions.0", f"{theirs}.attn_1", VAE_ATTENTION)
    return table


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """The name with its longest known prefix replaced; None if no prefix is known."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        prefix = ".".join(parts[:i])
        if prefix in table:
            return ".".join([table[prefix], *parts[i:]])
    return None


def to_ours(table: Table) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table}


def to_theirs(table: Table) -> dict[str, str]:
    return dict(table)


# --- what a file is, by what is in it ------------------------------------------------------------

# the first that is found in some name of the file wins
FAMILIES = (
    ("a LoRA", ("lora_up.", "lora_down.", "lora_A.", ".lora.", "lora_linear_layer", "to_q_lora")),
    ("a textual inversion embedding", ("emb_params", "string_to_param")),
    ("a ControlNet", ("control_model.", "controlnet_")),
    ("Flux", ("double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", ("joint_blocks.", "joint_transformer_blocks")),
    ("Stable Diffusion XL", ("conditioner.embedders.", "add_embedding.", "label_emb.0.0.")),
    ("Stable Diffusion 2", ("cond_stage_model.model.transformer.",)),
    ("Stable Cascade or Würstchen", ("clf.0.", "effnet_mapper")),
    ("PixArt or another transformer", ("adaln_single", "caption_projection")),
)


def family(names) -> str | None:
    """What other architecture the names of a file's tensors belong to, if it is a known one."""
    names = list(names)
    for told, marks in FAMILIES:
        if any(mark in name for mark in marks for name in names):
            return told
    return None
