"""Train a diffusion model.

python train.py                                        cartoon faces, two CPU cores, minutes
python train.py --data FOLDER --image_size 64          a folder of images
torchrun --nproc_per_node=8 train.py --mode pixel --data anime_faces
"""

import sys
from functools import partial

from ..config import (
    PRESETS,
    Parser,
    add_config_arguments,
    command_line,
    config_from_args,
    run_script,
)


def parse(args: list[str] | None = None):
    """Read the command line: (Config, the options given, dry_run)."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    presets = ", ".join(("none", *PRESETS))
    parser.option(
        "--preset NAME",
        f"recipe to start from: {presets}, or several with commas, the last on top; ddpm, edm, "
        "flow and jit are processes for any sizes (default, and below these: that of --data NAME "
        "or --sd_path, if any)",
    )
    parser.option("--dry_run", "print the configuration, the data and the model's size, and stop")
    values = vars(parser.parse_args(args))
    preset = values.pop("preset")
    dry_run = values.pop("dry_run")
    return config_from_args(values, preset), set(values), dry_run


def main() -> None:
    config, given, dry_run = parse()
    from ..runtime import distributed

    if dry_run:
        from ..training.dry_run import describe

        distributed.setup("cpu")
        typed = [arg for arg in sys.argv[1:] if arg != "--dry_run"]
        distributed.log(f"{describe(config, given)}\nnext: {command_line('train', *typed)}")
    else:
        from ..training.trainer import train

        train(config, given)
    distributed.cleanup()  # not after an error: other ranks may be waiting, torchrun ends them


command = partial(run_script, main)


if __name__ == "__main__":
    command()
