"""Read a learned table, a JSON object.

rows: (N, 11), t, alpha and sigma where a row evaluates, its guidance, and its weights of x, y, d0,
d1, d2, d3 and noise (process/samplers.py); the last row ends at sigma = 0. model: the digest of the
weights that it was learned for. taught_by: how.
"""

from pathlib import Path

import torch

from ..process.samplers import Table
from .atomic import blame
from .text_files import read_json


def read_table(path: Path) -> tuple[Table, str]:
    """Give the table and the digest. Raises UserError for a file that is missing or damaged."""
    content = read_json(path)
    with blame(f"{path} is no learned table", "; python -m diffusion.learn_table writes one"):
        rows = torch.tensor(content["rows"], dtype=torch.float64)
        t, levels, weight, columns = rows.split([1, 2, 1, 7], 1)
        if not rows.float().isfinite().all():
            raise ValueError("a number is not finite")
        levels = torch.cat([levels, levels.new_tensor([[1, 0]])])
        keep = torch.tensor([0.0, 1.0]).double().expand(len(t), 2)
        numbers = (t[:, 0], levels, columns, columns, keep, weight[:, 0])
        return Table(*numbers, str(path), len(t), "learned", 0.0, 1.0), content["model"]
