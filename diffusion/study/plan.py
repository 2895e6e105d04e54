"""What a study does, as data: settings, budgets, and the cells that the experiments consist of.

    1  a LoRA for each new style
    2  ablation: rank, steps and learning rate, one at a time around the centre
    3  LoRA, Textual Inversion and DreamBooth at equal data and equal steps
    4  interpolation between the LoRAs of two styles

A cell is one thing to train (or nothing: the base, a mixture), to draw with and to measure. A cell
that several experiments need is trained once.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from .. import UserError
from ..rules import check_bounds

EXPERIMENTS = {
    1: "a LoRA for each style",
    2: "ablation",
    3: "three methods",
    4: "interpolation of two styles",
}
STEP_FACTORS = (0.5, 1, 2)
RATE_FACTORS = (1 / 3, 1, 3)
# LoRA's centre is the middle rank; learning rates: of LoRA, Textual Inversion, DreamBooth
BUDGETS = {
    # an hour on two CPU cores with a latent model of some 5 M parameters at 64 px (sd_tiny)
    "small": dict(
        steps=300,
        batch_size=32,
        ranks=(2, 8, 32),
        targets="all",
        learning_rate=3e-3,
        ti_learning_rate=2e-2,
        dreambooth_learning_rate=1e-3,
        vectors=4,
        num_images=100,
        mix_images=40,
        sample_steps=20,
    ),
    # Stable Diffusion on a GPU
    "full": dict(
        steps=1500,
        batch_size=4,
        ranks=(4, 16, 64),
        targets="attention",
        learning_rate=1e-4,
        ti_learning_rate=5e-4,
        dreambooth_learning_rate=2e-6,
        vectors=4,
        num_images=500,
        mix_images=100,
        sample_steps=30,
    ),
}


@dataclass(frozen=True)
class Settings:
    """All that decides on a study's numbers. styles: those that are new to the base."""

    data: str
    load_path: str | None = None
    sd_path: str | None = None
    sd_config: str | None = None
    sd_weights: str = "raw"
    objective: str | None = None
    styles: tuple[str, ...] = ()
    experiments: tuple[int, ...] = (1, 2, 3, 4)
    budget: str = "small"
    features: str | None = None
    clip: str | None = None
    image_size: int | None = None
    class_prompt: str | None = None
    init_word: str | None = None
    guidance_scale: float | None = None
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    steps: int = 0
    batch_size: int = 0
    ranks: tuple[int, ...] = ()
    targets: str = ""
    learning_rate: float = 0.0
    ti_learning_rate: float = 0.0
    dreambooth_learning_rate: float = 0.0
    vectors: int = 0
    num_images: int = 0
    mix_images: int = 0
    sample_steps: int = 0
    sampler: str = "dpmpp_2m"
    points: int = 5

    @property
    def rank(self) -> int:
        """Of the centre."""
        return self.ranks[len(self.ranks) // 2]


def with_budget(settings: Settings) -> Settings:
    """What was not given (0 or empty) are the budget's. Raises UserError for bad ones."""
    if settings.budget not in BUDGETS:
        raise UserError(f"budget {settings.budget!r} is unknown; choose {' or '.join(BUDGETS)}")
    unset = {
        k: v for k, v in BUDGETS[settings.budget].items() if getattr(settings, k) in (0, (), "")
    }
    settings = replace(settings, **unset)
    if unknown := [e for e in settings.experiments if e not in EXPERIMENTS]:
        known = ", ".join(f"{n} ({text})" for n, text in EXPERIMENTS.items())
        raise UserError(f"experiment {unknown[0]} is unknown; choose of {known}")
    if not settings.experiments:
        raise UserError("--experiments names none; give some of 1,2,3,4")
    check_bounds(asdict(settings), "study")
    return settings


@dataclass(frozen=True)
class Cell:
    """One thing to train, draw with and measure.

    kind: base, lora, textual_inversion, dreambooth or mix. name: of its files.
    share: of the second style's adapter in a mixture (the first one's is 1 - share).
    """

    kind: str
    name: str
    style: str
    steps: int = 0
    learning_rate: float = 0.0
    rank: int = 0
    other: str | None = None
    share: float = 0.0

    @property
    def trains(self) -> bool:
        return self.steps > 0


def lora(s: Settings, style: str, slug: str, rank=None, steps=None, rate=None) -> Cell:
    rank = rank or s.rank
    steps = steps or s.steps
    rate = s.learning_rate if rate is None else float(f"{rate:.2g}")
    name = f"lora_{slug}_rank{rank}_steps{steps}_lr{rate:g}"
    return Cell("lora", name, style, steps, rate, rank)


def first(s: Settings, slugs: dict[str, str]) -> list[Cell]:
    return [lora(s, style, slugs[style]) for style in s.styles]


def ablation(s: Settings, slugs: dict[str, str]) -> dict[str, list[Cell]]:
    """{what changes: its cells, in order}, of the first style."""
    style = s.styles[0]
    slug = slugs[s.styles[0]]
    return {
        "rank": [lora(s, style, slug, rank=rank) for rank in sorted(set(s.ranks))],
        "steps": [lora(s, style, slug, steps=max(1, round(s.steps * f))) for f in STEP_FACTORS],
        "learning_rate": [
            lora(s, style, slug, rate=None if f == 1 else s.learning_rate * f) for f in RATE_FACTORS
        ],
    }


def methods(s: Settings, slugs: dict[str, str]) -> list[Cell]:
    """The three methods, for the first style."""
    style = s.styles[0]
    slug = slugs[s.styles[0]]
    return [
        lora(s, style, slug),
        Cell("textual_inversion", f"textual_inversion_{slug}", style, s.steps, s.ti_learning_rate),
        Cell("dreambooth", f"dreambooth_{slug}", style, s.steps, s.dreambooth_learning_rate),
    ]


def mixtures(s: Settings, slugs: dict[str, str]) -> list[Cell]:
    """Between the LoRAs of the first two styles."""
    a, b = s.styles[:2]
    shares = [i / (s.points - 1) for i in range(s.points)]
    return [
        Cell("mix", f"mix_{slugs[a]}_{slugs[b]}_{share:.2f}", a, other=b, share=share)
        for share in shares
    ]


def cells_of(s: Settings, slugs: dict[str, str]) -> Iterator[Cell]:
    """All cells in the order in which they run, each once. slugs: {style: for file names} of all
    styles of the data, new and known ones: the base draws each."""
    found = [Cell("base", f"base_{slug}", style) for style, slug in slugs.items()]
    if 1 in s.experiments:
        found += first(s, slugs)
    if 3 in s.experiments:
        found += methods(s, slugs)
    if 4 in s.experiments:
        found += [lora(s, style, slugs[style]) for style in s.styles[:2]] + mixtures(s, slugs)
    if 2 in s.experiments:
        found += [cell for cells in ablation(s, slugs).values() for cell in cells]
    return iter(dict.fromkeys(found))
