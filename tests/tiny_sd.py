"""Write a tiny Stable Diffusion of random weights, without diffusers and without this project.

assets/tiny_sd.json holds its configs, the names and shapes of its tensors, and the names that they
have in an original single file. It was made with diffusers, which reads the folder as well.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PLAN = json.loads((Path(__file__).parent / "assets" / "tiny_sd.json").read_text())


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Make the tensors of each part's file."""
    made = {}
    for part, shapes in PLAN["parts"].items():
        made[part] = {}
        for name, shape in shapes.items():
            count = sum(map(len, made.values()))
            x = torch.randn(shape, generator=torch.Generator().manual_seed(count))
            if len(shape) == 1:
                x = 0.1 * x + ("norm" in name and name.endswith("weight"))
            elif "embedding" not in name:
                x = x / x[0].numel() ** 0.5
            made[part][name] = x
    return made


def save_folder(folder: Path, prediction: str = "epsilon") -> None:
    """Write a diffusers folder."""
    for name, config in PLAN["configs"].items():
        if "prediction_type" in config:
            config = config | {"prediction_type": prediction}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    symbols = [*PLAN["symbols"], *(f"{s}</w>" for s in PLAN["symbols"])]
    vocabulary = [*symbols, "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "tokenizer" / "merges.txt").write_text(PLAN["merges"])
    for part, content in tensors().items():
        save_file(content, folder / part, metadata={"format": "pt"})


def save_single_file(path: Path) -> None:
    """Write the same weights as an original single file."""
    parts, content = tensors(), {}
    for name, (part, source, *shape) in PLAN["file"].items():
        x = parts[part][source]
        content[name] = x.reshape(shape[0]).clone() if shape else x
    save_file(content, path)
