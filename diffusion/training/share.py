"""What --push_to_hub uploads of a run, and the model card beside it.

Never what names this machine or its user: config.json, checkpoints, TensorBoard's files.
"""

import re
import shlex
import sys
from pathlib import Path

from .. import UserError
from ..config import Config, shared_path
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

    python {command}

| | |
|---|---|
{metrics}

To use it:

"""
USES = {  # by the adapter, or the mode of what is no model
    "none": """    python sample.py --load_path hf:{push_to_hub}

    import diffusion
    model = diffusion.load("hf:{push_to_hub}")
    images = model.sample(4)    # (4, 3, H, W) in [-1, 1]; of a text model sample(["a prompt"])
""",
    "lora": """    python sample.py --{start} {base} --lora hf:{push_to_hub}

    import diffusion
    model = diffusion.load("{base}", lora="hf:{push_to_hub}")
    images = model.sample(4)    # (4, 3, H, W) in [-1, 1]; of a text model sample(["a prompt"])
""",
    "textual_inversion": """    python sample.py --{start} {base} \\
        --embedding hf:{push_to_hub} --prompt "{token}"

    import diffusion
    model = diffusion.load("{base}", embedding="hf:{push_to_hub}")
    images = model.sample(["{token}"] * 4)    # (4, 3, H, W) in [-1, 1]
""",
    "vae": "    python train.py --mode latent --vae hf:{push_to_hub}\n",
}


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
    args = [
        re.sub("(?:^|(?<=[=@:]))/.*", lambda path: shared_path(path[0]), arg) for arg in sys.argv
    ]
    text = (CARD + USES.get(config.mode, USES[config.adapter])).format(
        **shared,
        parent=f"base_model: {base[1]}\n" if base else "",
        grid="![samples](samples.png)\n\n" if "samples.png" in files else "",
        start=start,
        base=shared[start],
        command=shlex.join(args),
        metrics="\n".join(rows.values()),
    )
    try:
        upload(name, files | {"README.md": text.encode()})
    except UserError as error:
        log(
            f"warning: {error}; it can be uploaded later by the same command, or without the card "
            f"by hf upload {name} {shlex.quote(str(folder))} . --include {' '.join(FILES)}"
        )
