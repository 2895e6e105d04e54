"""Export a model that was fine-tuned here as a file that other programs read.

python -m diffusion.export results/model.pt my-model                  a diffusers folder
python -m diffusion.export results/model.pt my-model.safetensors     an original single file
python -m diffusion.export results/model.pt my-model --dtype fp16    half the size

The U-Net is the trained one; the rest is that of the Stable Diffusion model it was trained from.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from .. import UserError
from ..config import Parser, command_line, model_path, run_script
from .atomic import create_whole
from .checkpoint import load_weights
from .sd_files import PREDICTIONS, load_sd, read_scheduler, save_sd_file, save_sd_folder
from .strict import load_part

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse(args: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    option = parser.option
    model = "a run, model.pt or ema.safetensors of --mode latent --sd_path"
    parser.add_argument("model", type=model_path, metavar="MODEL", help=model)
    target = "a new folder, or a .safetensors file"
    parser.add_argument("target", metavar="TARGET", help=target)
    weights = "weights to export: EMA weights, or those of the last step"
    option("--weights", weights, default="ema", choices=("ema", "raw"))
    option("--sd_path PATH", "where the Stable Diffusion model is now, if it moved")
    option("--dtype", "precision of the exported weights", default="fp32", choices=tuple(DTYPES))
    return parser.parse_args(args)


def main() -> None:
    args = parse()
    path = Path(args.model)
    target = Path(args.target)
    single_file = target.suffix == ".safetensors"
    tensors, config, metadata = load_weights(path, args.weights)
    if config.mode != "latent" or config.sd_path is None:
        raise UserError(
            f"{path} was not trained from a Stable Diffusion model (--mode latent "
            "--sd_path): other programs cannot read its network"
        )
    if os.path.lexists(target):
        raise UserError(f"{target} exists; give a new name")
    base = args.sd_path or config.sd_path
    sd = load_sd(base, config.sd_config)
    prediction = PREDICTIONS.get(config.objective, config.objective)
    sd.scheduler = read_scheduler(base, config.sd_config, prediction)
    sd.unet, _ = load_part("unet", metadata["networks"].get("unet"), tensors, path)
    if not single_file:  # without the last layers, which clip skip does not read
        text = sd.text_encoder
        count = text.config.num_hidden_layers - config.clip_skip + 1
        text.config = replace(text.config, num_hidden_layers=count)
        del text.text_model.encoder.layers[count:]
    elif config.clip_skip > 1:
        print(f"clip skip {config.clip_skip} is not stored in {target}: set it where that is used")
    for network in (sd.unet, sd.vae, sd.text_encoder):
        network.to(DTYPES[args.dtype])
    save = save_sd_file if single_file else save_sd_folder
    create_whole(target, lambda path: save(sd, path))
    if config.objective != "eps":
        print(f"{target} predicts {config.objective}, and states it")
    if config.path != "vp":
        print(
            f"{target} was trained on path {config.path}, which is one process with its base's: "
            "other programs sample it as they do the base"
        )
    print(f"{target}: the model of step {metadata['step']}, {args.dtype}")
    print(f"next: {command_line('sample', sd_path=target, prompt='a picture')}")


if __name__ == "__main__":
    run_script(main)
