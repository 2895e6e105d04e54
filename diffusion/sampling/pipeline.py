"""The parts put together: configuration or checkpoint -> network, schedule -> images.

pipeline = Pipeline.load("results/model.pt")
images = pipeline.sample(range(16), steps=50)          # (16, 3, H, W) in [-1, 1]
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..files.checkpoint import load_weights
from ..models.build import blank
from ..models.layers import folded
from ..models.unet import UNet
from ..process.samplers import Inpaint, Table, guided, make_table, sample_loop
from ..process.schedule import Schedule, make_schedule
from ..runtime.cuda_graph import Graphs
from ..runtime.seeding import ImageNoise


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of --amp on a device, None for float32. Raises UserError if it has none.

    auto: bf16 on CUDA from sm_80 and on CPUs with AMX, fp16 on older CUDA, else float32.
    """
    if amp == "auto":
        if device.type == "cuda":
            new = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if new else torch.float16
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return torch.bfloat16 if device.type == "cpu" and amx() else None
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use auto, bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def is_number(text: str) -> bool:
    """Whether a text is a whole number in plain digits."""
    return text.isascii() and text.isdigit() and len(text) < 20


def build_model(config: Config, num_classes: int) -> UNet:
    return UNet(
        config.unet_dim,
        config.dim_mults,
        heads=config.heads,
        dropout=config.dropout,
        num_classes=num_classes if config.condition == "class" else 0,
        checkpointing=config.checkpointing,
    ).to(memory_format=torch.channels_last)


@dataclass(eq=False)
class Pipeline:
    """A network and what is needed to sample from it.

    classes: their names in label order; empty for an unconditional network.
    """

    config: Config
    model: nn.Module
    schedule: Schedule
    classes: list[str] = field(default_factory=list)
    device: torch.device = torch.device("cpu")
    compiled: bool = False  # whether to torch.compile the network
    graphs: Graphs = field(default_factory=Graphs, repr=False)
    ready: dict[torch.dtype | None, nn.Module] = field(default_factory=dict, repr=False)
    clip = True  # x0 is known to lie in [-1, 1]

    @classmethod
    def load(cls, path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"):
        """From a model.pt or .safetensors file of --mode pixel. Raises UserError for others."""
        tensors, config, metadata = load_weights(Path(path), weights)
        if config.mode != "pixel":
            raise UserError(
                f"{path} is of --mode {config.mode}: open it with open_pipeline of "
                "diffusion/sampling/load.py"
            )
        try:
            with blank():  # what a file claims costs nothing until it fits
                model = build_model(config, len(metadata["classes"]))
            model.load_state_dict(tensors, assign=True)
            own = {k: v.to(device, torch.float32, copy=True) for k, v in tensors.items()}
            model.load_state_dict(own, assign=True)  # the file itself may go
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} does not fit its own configuration: {reason}") from None
        schedule = make_schedule(config.schedule, config.time_steps, config.zero_snr)
        model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        return cls(config, model, schedule, metadata["classes"], torch.device(device))

    @property
    def conditional(self) -> bool:
        """Whether the network is told a class."""
        return self.config.condition == "class"

    @property
    def reads_prompts(self) -> bool:
        return self.config.condition == "text"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what is diffused: (C, H, W)."""
        return (3, self.config.image_size, self.config.image_size)

    def frames(
        self,
        indices,
        *,
        seed: int = 0,
        sampler: str = "ddim",
        steps: int | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        amp: str = "auto",
        eps: Tensor | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        cuda_graph: bool = False,
        table: Table | None = None,
        **told,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample the images with these indices; yields (x_s, x0) after each step.

        Image i of a seed starts from the same noise whatever stands beside it. steps: None means
        50, or all of a shorter schedule. eps: the noise to start from instead, (B, C, H, W).
        init: what `encode` gives, noised for the last `strength` of the steps, SDEdit
        (arXiv:2108.01073); with a mask (B, 1, H, W) it stays where the mask is 0, and at
        strength 1 nothing of it is in the noise that the rest starts from.
        cuda_graph: each step is one launch, captured at the first call with its settings; the
        network is then as it was at that call.
        table: what is run, in place of sampler, steps, spacing, eta and strength.
        told: what the network is told, see `denoiser`.
        Raises ValueError for settings that do not go together.
        """
        if table is None:
            table = self.table(sampler, steps, spacing, eta, strength)
        noise = ImageNoise(seed, indices, self.shape)
        draw = lambda: noise(self.device).contiguous(memory_format=torch.channels_last)  # noqa: E731
        start = draw()  # also where another noise is given: the rows' noise is then the same
        x = eps = start if eps is None else eps.to(self.device)
        inpaint = None
        if init is not None:
            alpha, sigma = table.levels[0].tolist()
            if mask is None or table.strength < 1:
                x = alpha * init.to(self.device) + sigma * eps
            if mask is not None:
                inpaint = Inpaint(init.to(self.device), mask.to(self.device), eps)
        denoise, inputs = self.denoiser(len(x), amp, **told)
        capture = None
        if cuda_graph:
            settings = {k: v for k, v in told.items() if isinstance(v, (bool, int, float))}
            capture = partial(self.graphs.wrap, key=(amp, *sorted(settings.items())))
        return sample_loop(
            denoise,
            x,
            table,
            self.config.objective,
            told=inputs,
            noise=draw,
            clip=self.clip,
            inpaint=inpaint,
            capture=capture,
        )

    def denoiser(
        self,
        n: int,
        amp: str,
        labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        batched: bool = True,
        **other,
    ):
        """(x, t, *inputs) -> the network's output, for n images; and the inputs.

        labels: (n,) int64, the null label where there is none; None means no label at all.
        batched: guidance evaluates both in one call; else in two, in half the memory.
        """
        if other:
            raise UserError(f"this model reads no text: it takes no {', '.join(other)}")
        model = self.autocast(amp)
        if not self.conditional:
            if labels is not None or guidance_scale != 1:
                raise UserError(
                    "this model was trained without --condition class: it takes no "
                    "class label and no guidance"
                )
            return model, ()
        if labels is None and guidance_scale != 1:
            raise UserError("guidance leads towards a class: give a class label with it")
        null = torch.full((n,), self.model.null_label, device=self.device)
        labels = null if labels is None else labels.to(self.device)
        return guided(model, guidance_scale, guidance_rescale, batched), (labels, null)

    def table(self, sampler="ddim", steps=None, spacing=None, eta=None, strength=1.0) -> Table:
        """What `frames` runs."""
        steps = min(50, len(self.schedule)) if steps is None else steps
        options = dict(spacing=spacing, eta=eta, strength=strength)
        return make_table(self.schedule, sampler, steps, **options)

    def sample(self, indices, **options) -> Tensor:
        """The last x of `frames`, decoded: (B, 3, H, W) float32 in [-1, 1]."""
        [(x, _)] = deque(self.frames(indices, **options), maxlen=1)
        return self.decode(x)

    def labels(self, choice: str | None, indices) -> Tensor | None:
        """Find the class labels of images `indices`, (B,), by a class's name or number.

        Names come first. Where a class has a number for a name, "9" is that name and no position.
        "all", unless it is a name: the classes in turn. Raises UserError for an unknown class.
        """
        if choice is None:
            return None
        names = self.classes
        if choice in names:
            return torch.full((len(indices),), names.index(choice))
        if choice == "all" and names:
            return self.labels_in_turn(indices)
        numbered = not any(map(is_number, names))
        if numbered and is_number(choice) and int(choice) < len(names):
            return torch.full((len(indices),), int(choice))
        known = [f"{i} {name}" for i, name in enumerate(names)] if numbered else names
        raise UserError(
            f"class_label {choice!r} is unknown; the model's classes are "
            f"{', '.join(known) or 'none: it is unconditional'}"
        )

    def labels_in_turn(self, indices) -> Tensor | None:
        """Class labels of images `indices`, (B,), of which each class has as many; None without."""
        return torch.tensor([i % len(self.classes) for i in indices]) if self.conditional else None

    def prompted(self, prompts: Sequence[str], negative: str = "") -> Callable[..., dict]:
        """indices -> options of `frames`: the images take turns with these prompts.

        All are read in as many pieces as the longest needs, so that batch mates change nothing.
        Raises UserError for a model that reads none.
        """
        raise UserError("this model reads no text: it takes no prompts")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.config.image_size, self.config.image_size)

    @property
    def clip_skip(self) -> int | None:
        """Which layer of a text encoder is read, from the end; None where that is the last."""
        return None

    def precision(self, amp: str) -> str:
        """Name the floating-point type that the network computes in."""
        dtype = next(self.model.parameters()).dtype
        if dtype == torch.float32:
            dtype = amp_dtype(amp, self.device) or dtype
        return str(dtype).removeprefix("torch.")

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to what is diffused: in pixel mode, themselves."""
        return images.to(self.device)

    def decode(self, x: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return x

    def forget(self) -> None:
        """Drop what was captured or compiled of the model: it has changed."""
        self.graphs.graphs.clear()
        self.ready.clear()

    @property
    def stepped(self) -> nn.Module:
        """What of the model runs at every step."""
        return self.model

    def network(self, dtype: torch.dtype | None) -> nn.Module:
        """As it is now, ready for sampling; a compiled one as it was when first asked for."""
        if not self.compiled:
            return folded(self.stepped, dtype)
        if dtype not in self.ready:
            self.ready[dtype] = folded(self.stepped, dtype)
            self.ready[dtype].compile(dynamic=False)
        return self.ready[dtype]

    def autocast(self, amp: str):
        """The network as a function (x, t, labels=None) under mixed precision."""
        dtype = amp_dtype(amp, self.device)
        network = self.network(dtype)

        def call(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return network(x, t, labels)

        return call
