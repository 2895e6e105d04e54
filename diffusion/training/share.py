"""What --push_to_hub uploads of a run, and the model card beside it.

Never what names this machine or its user: config.json, checkpoints, TensorBoard's files.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from .. import UserError
from ..config import DEFAULTS, Config, command_line, shared_path
from ..files.atomic import read_lines
from ..files.checkpoint import step_files
from ..files.hub_files import NAME, upload
from ..runtime.distributed import is_main, log

FILES = """ema.safetensors best.safetensors adapter.safetensors adapter_kohya.safetensors
    adapter_model.safetensors adapter_config.json metadata.json metrics.jsonl""".split()
CARD = """---
library_name: diffusion
tags: [diffusion, "mode:{mode}", "adapter:{adapter}"]
{parent}---
# {push_to_hub}

{grid}Trained on `{data}` by

    {command}

| | |
|---|---|
{metrics}

To use it:

    python {use}
"""
PYTHON = """
    import diffusion
    model = diffusion.load({load})
    images = model.sample(4)    # (4, 3, H, W) in [-1, 1]; of a text model sample(["a prompt"])
"""
USES = {  # by the adapter: a command, arguments of load
    "none": ("sample.py --load_path hf:{push_to_hub}", '"hf:{push_to_hub}"'),
    "lora": (
        "sample.py --{start} {base} --lora hf:{push_to_hub}",
        '"{base}", lora="hf:{push_to_hub}"',
    ),
    "textual_inversion": (
        'sample.py --{start} {base} --embedding hf:{push_to_hub} --prompt "{token}"',
        '"{base}", embedding="hf:{push_to_hub}"',
    ),
}
VAE = ("train.py --mode latent --vae hf:{push_to_hub}", "")  # which samples nothing by itself
# of an argument, from where a path of this machine begins
PLACE = re.compile(r"(?:^|(?<=[=@:,]))(?:/|\w:\\|~|(?:\.\./)+).*")


def command_of(config: Config) -> str:
    """Write the command, or the call, that trained a run, without places of this machine."""
    if Path(sys.argv[0]).stem.removeprefix("diffusion-") == "train":
        short = lambda found: shared_path(os.path.abspath(os.path.expanduser(found[0])))  # noqa: E731
        return command_line("train", *(PLACE.sub(short, arg) for arg in sys.argv[1:]))
    own = {name: value for name, value in config.shared().items() if value != DEFAULTS[name]}
    return f"diffusion.train({', '.join(f'{name}={value!r}' for name, value in own.items())})"


def push(config: Config, folder: Path) -> None:
    """Upload what may be shared of a run, if that was asked for. What fails is a warning."""
    shared = config.shared()
    name = config.push_to_hub
    if name is None or not is_main():
        return
    files = {file.name: file for pattern in FILES for file in folder.glob(pattern)}
    files |= zip(["samples.png"], step_files(folder, "samples/step_*.png"))  # the newest
    lines = read_lines(folder / "metrics.jsonl")
    rows = {key: f"| {key} | {value} |" for line in lines for key, value in line.items()}
    start = "load_path" if config.load_path else "sd_path"
    base = NAME.match(f"{shared[start]}")
    use, load = VAE if config.mode == "vae" else USES[config.adapter]
    known = dict(
        **shared,
        parent=f"base_model: {base[1]}\n" if base else "",
        grid="![samples](samples.png)\n\n" if "samples.png" in files else "",
        start=start,
        base=shared[start],
        command=command_of(config),
        metrics="\n".join(rows.values()),
    )
    card = CARD + (PYTHON if load else "")
    text = card.format(use=use.format(**known), load=load.format(**known), **known)
    try:
        upload(name, files | {"README.md": text.encode()})
    except UserError as error:
        log(
            f"warning: {error}; it can be uploaded later by the same command, or without the card "
            f"by hf upload {name} {shlex.quote(str(folder))} . --include {' '.join(FILES)}"
        )
