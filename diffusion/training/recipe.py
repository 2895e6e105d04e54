"""What --mode changes: the batches that come in, what is trained, its loss, its pictures.

The loop in trainer.py is the same for all. A task has

    data                        batches by step, and the held-out images
    build()                     the network that is trained
    draw(step)                  the random numbers of a global batch
    loss(model, batch, drawn, low, high)     of samples low ... high-1, (high - low,)
    heldout_loss(model, micro)  of the averaged weights
    sheet(model, micro)         a picture of what the averaged weights can do
    told(model)                 what a checkpoint must tell besides the configuration
    start, state, restore, write, result      see Task
"""

from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..data.batches import Batch, move, open_batches, to_unit
from ..files import checkpoint
from ..pictures.grid import NonFinite, grid, to_uint8
from ..process.objective import training_loss
from ..process.schedule import make_schedule
from ..runtime import distributed as dist
from ..runtime.seeding import generator
from ..sampling.conditioning import TextConditioned
from ..sampling.pipeline import Pipeline, amp_dtype, build_model
from .steps import draw


class Task:
    """What most tasks share: the whole network is trained, and written."""

    config: Config

    def start(self, model: nn.Module, fresh: bool) -> None:
        """Bring the built network to where training begins. fresh: no checkpoint follows."""
        if fresh and self.config.load_path is not None:
            start_from(model, *checkpoint.load_weights(Path(self.config.load_path))[:2])

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint keeps of the network."""
        return model.state_dict()

    def recognise(self, checkpoint: dict) -> None:
        """Raises UserError if a checkpoint was made with other networks than are there now."""

    def restore(self, model: nn.Module, kept: dict[str, Tensor], checkpoint: dict) -> None:
        """The inverse of `state`. checkpoint: all that it holds."""
        model.load_state_dict(kept)

    def write(self, folder: Path, model: nn.Module, step: int, told: dict, improved: bool) -> None:
        """The averaged weights, to share: ema.safetensors, and best.safetensors if this is it."""
        for name in ("ema", *(["best"] if improved else [])):
            path = folder / f"{name}.safetensors"
            checkpoint.save_weights(path, model.state_dict(), self.config, step=step, **told)

    def result(self, folder: Path) -> str:
        prompt = ' --prompt "..."' if self.config.condition == "text" else ""
        return f"{folder / 'model.pt'}; python sample.py --load_path {folder / 'model.pt'}{prompt}"


def start_from(model: nn.Module, weights: dict[str, Tensor], theirs: Config) -> None:
    """Take weights of another run. Raises UserError if they are of another architecture."""
    whole = any(name.startswith("unet.") for name in weights)
    if isinstance(model, TextConditioned) and not whole:
        model = model.unet  # fine-tuned Stable Diffusion, whose text encoder was not
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"--load_path does not fit this network (it was trained with unet_dim "
            f"{theirs.unet_dim}, dim_mults {theirs.dim_mults}, heads {theirs.heads}, "
            f"condition {theirs.condition}): {error}"
        ) from None


class Diffusion(Task):
    """--mode pixel: from x_t, predict what `objective` says."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.device = device
        self.data = open_batches(config)
        self.schedule = make_schedule(config.schedule, config.time_steps, config.zero_snr)
        self.levels = self.schedule.to(device)

    def build(self) -> nn.Module:
        return build_model(self.config, len(self.data.classes))

    def pipeline(self, model: nn.Module) -> Pipeline:
        return Pipeline(self.config, model, self.schedule, self.data.classes, self.device)

    def told(self, model: nn.Module) -> dict:
        return {"classes": list(self.data.classes)}

    # --- a step

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,), eps (B, C, H, W), and which conditions are hidden (B,)."""
        shape = (3, self.config.image_size, self.config.image_size)
        return draw(self.config, step, len(self.schedule), shape, self.device)

    def loss(self, model, batch: Batch, drawn, low: int, high: int) -> Tensor:
        return self.diffusion_loss(model, *self.inputs(batch, drawn, low, high))

    def inputs(self, batch: Batch, drawn, low: int, high: int) -> tuple:
        """x0, t, eps and what the network is told, of samples low ... high-1."""
        t, eps, hidden = (value[low:high] for value in drawn)
        return self.x0(batch), t, eps, self.condition(batch, hidden)

    def diffusion_loss(self, model, x0, t, eps, cond) -> Tensor:
        c = self.config
        return training_loss(
            model, self.levels, c.objective, x0, t, eps, cond, c.loss, c.min_snr_gamma
        )

    def x0(self, batch: Batch) -> Tensor:
        return to_unit(batch.pixels, self.device)

    def condition(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """What the network is told: None, or labels of which the hidden ones are the null label."""
        if self.config.condition == "none":
            return None
        hidden = hidden | (batch.labels < 0)  # images without a label
        return move(batch.labels.masked_fill(hidden, len(self.data.classes)), self.device)

    # --- every few hundred steps

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module, micro: int) -> float:
        """The averaged weights' loss on the held-out images, each with its fixed t and noise."""
        n = len(self.data.held_out)
        T = len(self.schedule)
        seed = self.config.seed
        shuffled = torch.randperm(n, generator=generator(seed, "held out t"))
        t = (shuffled.double() + 0.5).mul(T / n).long().to(self.device)  # stratified over 0 ... T-1
        total = torch.zeros((), device=self.device)
        pieces = [(low, min(low + micro, n)) for low in range(0, n, micro)]
        dtype = amp_dtype(self.config.amp, self.device)

        def network(*inputs: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return model(*inputs)

        for low, high in pieces[dist.rank() :: dist.world_size()]:
            batch = self.data.held_out_batch(low, high)
            x0 = self.x0(batch)
            generators = [generator(seed, "held out", i) for i in range(low, high)]
            eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
            shown = torch.zeros(high - low, dtype=torch.bool)
            cond = self.condition(batch, shown)
            total += self.diffusion_loss(network, x0, t[low:high], eps.to(self.device), cond).sum()
        return float(dist.all_reduce_sum(total)) / n

    def frames(self, model: nn.Module, indices):
        """`Pipeline.frames` with the run's own settings; a block of the sheet for each class."""
        c = self.config
        pipeline = self.pipeline(model)
        labels = None
        if pipeline.conditional:
            labels = torch.tensor([i * len(pipeline.classes) // c.num_samples for i in indices])
        return pipeline.frames(
            indices,
            seed=c.seed,
            sampler=c.sampler,
            amp=c.amp,
            labels=labels,
            steps=min(c.sample_steps, c.time_steps),
            guidance_scale=c.guidance_scale,
        )

    def check(self, model: nn.Module) -> None:
        """Raises UserError now for settings that would end the first sample grid."""
        try:
            if self.config.num_samples:
                next(self.frames(model, [0]))
        except ValueError as error:
            raise UserError(f"sample grids: {error}") from None

    def sheet(self, model: nn.Module, micro: int) -> Image.Image | None:
        """config.num_samples images on rank 0, which all ranks draw; None elsewhere.

        Raises NonFinite on all ranks where a picture of one of them is none.
        """
        size = self.config.image_size
        decode = self.pipeline(model).decode
        images = [np.empty((0, size, size, 3), np.uint8)]
        every = np.arange(self.config.num_samples)
        mine = np.array_split(every, dist.world_size())[dist.rank()].tolist()
        bad = None
        for low in range(0, len(mine), micro):
            indices = mine[low : low + micro]
            [(x, _)] = deque(self.frames(model, indices), maxlen=1)
            try:
                images.append(to_uint8(decode(x), indices))
            except NonFinite as error:
                bad = error
        if dist.any_rank(bad is not None):  # all ranks, or the others would wait
            raise bad or NonFinite([], "pictures of another rank")
        parts = dist.gather(torch.from_numpy(np.concatenate(images)))
        return grid(torch.cat(parts).numpy()) if parts is not None else None
