"""Plan a study: the budgets, and the cells that the experiments consist of.

    1  a LoRA for each new style
    2  ablation: rank, steps and learning rate, one at a time around the centre
    3  LoRA, Textual Inversion and DreamBooth at equal data and equal steps
    4  interpolation between the LoRAs of two styles

A cell is one thing to train (or nothing: the base, a mixture), to sample from and to measure. One
that several experiments need is trained once.
"""

from argparse import Namespace as Settings  # of __main__.parse: an attribute for each option
from dataclasses import dataclass

EXPERIMENTS = {
    1: "a LoRA for each style",
    2: "ablation",
    3: "three methods",
    4: "interpolation of two styles",
}
# small: an hour on two CPU cores with a latent model of some 5 M parameters at 64 px (sd_tiny);
# full: Stable Diffusion on a GPU
SMALL_AND_FULL = {
    "steps": (300, 1500),
    "batch_size": (32, 4),
    "ranks": ((2, 8, 32), (4, 16, 64)),
    "targets": ("all", "attention"),
    "learning_rate": (3e-3, 1e-4),
    "ti_learning_rate": (2e-2, 5e-4),
    "dreambooth_learning_rate": (1e-3, 2e-6),
    "vectors": (4, 4),
    "num_images": (100, 500),
    "mix_images": (40, 100),
    "sample_steps": (20, 30),
}
BUDGETS = ("small", "full")


@dataclass(frozen=True)
class Cell:
    """Describe one thing to train, to sample from and to measure.

    kind: base, lora, textual_inversion, dreambooth or mix. name: of its files. steps: of training,
    0 where nothing is trained.
    share: weight of the second style's LoRA in a mixture (the first one's is 1 - share).
    """

    kind: str
    name: str
    style: str
    steps: int = 0
    learning_rate: float = 0.0
    rank: int = 0
    other: str | None = None
    share: float = 0.0


# tables of an experiment's results: {what the table is about: {name of a row: its cell}}
Tables = dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Plan:
    """List the cells of a study. slugs: {style: its part of file names}, of all of the data."""

    settings: Settings
    slugs: dict[str, str]

    def lora(self, style: str, **changes) -> Cell:
        """Make a LoRA's cell, with changes to the centre's rank, steps or learning_rate."""
        s = self.settings
        rank = s.ranks[len(s.ranks) // 2]
        values = {"rank": rank, "steps": s.steps, "learning_rate": s.learning_rate} | changes
        name = "lora_{}_rank{rank}_steps{steps}_lr{learning_rate:g}".format(
            self.slugs[style], **values
        )
        return Cell("lora", name, style, **values)

    def loras(self) -> Tables:
        return {style: {"LoRA": self.lora(style)} for style in self.settings.styles}

    def ablation(self) -> Tables:
        """Change one setting of the first style's LoRA at a time; tables are named after it."""
        s = self.settings
        low, high = (float(f"{s.learning_rate * factor:.2g}") for factor in (1 / 3, 3))
        values = {
            "rank": sorted(set(s.ranks)),
            "steps": [round(s.steps / 2), s.steps, 2 * s.steps],
            "learning_rate": [low, s.learning_rate, high],
        }
        return {
            what: {
                f"{what.replace('_', ' ')} {value:g}": self.lora(s.styles[0], **{what: value})
                for value in row
            }
            for what, row in values.items()
        }

    def methods(self) -> Tables:
        """Learn the first style by each method, in as many steps."""
        s = self.settings
        style = s.styles[0]
        rows = {"LoRA": self.lora(style)}
        for title, kind, rate in (
            ("Textual Inversion", "textual_inversion", s.ti_learning_rate),
            ("DreamBooth", "dreambooth", s.dreambooth_learning_rate),
        ):
            rows[title] = Cell(kind, f"{kind}_{self.slugs[style]}", style, s.steps, rate)
        return {style: rows}

    def mixtures(self) -> Tables:
        """Interpolate from the first style's LoRA to the second's."""
        a, b = self.settings.styles[:2]
        rows = {}
        for i in range(self.settings.points):
            share = i / (self.settings.points - 1)
            name = f"mix_{self.slugs[a]}_{self.slugs[b]}_{share:.2f}"
            rows[f"w = {share:.2f}"] = Cell("mix", name, a, other=b, share=share)
        return {"share": rows}

    def tables(self) -> dict[int, Tables]:
        """List the experiments in the order in which they run."""
        every = {1: self.loras, 3: self.methods, 4: self.mixtures, 2: self.ablation}
        return {n: make() for n, make in every.items() if n in self.settings.experiments}

    def base(self, style: str) -> Cell:
        return Cell("base", f"base_{self.slugs[style]}", style)

    def trained(self, cell: Cell) -> list[Cell]:
        """List the cells whose training a cell samples with: its own, or those of two LoRAs."""
        if cell.kind == "mix":
            return [self.lora(cell.style), self.lora(cell.other)]
        return [cell] if cell.steps else []

    def cells(self) -> list[Cell]:
        """List each cell once, in the order in which they run; the base samples every style."""
        found = [self.base(style) for style in self.slugs]
        for tables in self.tables().values():
            for cell in (cell for rows in tables.values() for cell in rows.values()):
                found += [*self.trained(cell), cell]
        return list(dict.fromkeys(found))
