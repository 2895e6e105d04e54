"""A run as a recipe: batches, codec, conditioning and what is trained.

    batch  = batches(step, low, high)                images, or their latents and captions
    x0     = codec.x0(batch)                         pixels in [-1, 1], or scaled latents
    cond   = conditioning.of_batch(batch, drop)      nothing, classes or texts
    loss   = training_loss(network, levels, x0, eps, cond)
    trainable                                        which parameters train, what is saved of them

The pipeline that makes the sample grids is put together from the same parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..config import Config, Size, sides, size_text
from ..data.augment import augment
from ..data.batch import Batch
from ..data.batches import open_batches
from ..data.latents import EncodedBatches
from ..models.cond import Cond
from ..models.text_unet import networks_of
from ..pictures.grid import grid_of_ranks
from ..process.consistency import consistency_loss
from ..process.objective import training_loss
from ..process.schedule import NoisePath
from ..runtime import distributed as dist
from ..runtime.precision import amp_dtype
from ..runtime.seeding import generator, seed_of
from ..sampling.codec import LatentCodec, PixelCodec
from ..sampling.conditioning import ClassLabels, Prompts, Unconditional
from ..sampling.load import (
    FrozenStack,
    build_network,
    check_digests,
    conditioning_of,
    load,
    open_stack,
    path_of,
)
from ..sampling.pipeline import Pipeline
from . import finetune
from .finetune import Adapter, Everything, start_from
from .finetune_config import Base
from .latent_batches import encode_batches, grid_prompts
from .steps import Draw, draw, loss_coefficients, total_steps


@dataclass(eq=False)
class Recipe:
    """Train diffusion in pixels or latents.

    batches: (step, low, high, then) -> Batch, and the held-out images.
    prompts: those of the sample grids. stack: of a latent model, what is not trained.
    prior: the class images of DreamBooth, one beside each sample. guide: of the sample grids.
    """

    config: Config
    device: torch.device
    schedule: NoisePath
    batches: EncodedBatches
    codec: PixelCodec | LatentCodec
    conditioning: Unconditional | ClassLabels | Prompts
    trainable: Everything | Adapter
    prompts: list[str]
    stack: FrozenStack | None = None
    prior: EncodedBatches | None = None
    guide: Pipeline | None = None

    # --- the network

    def build(self) -> nn.Module:
        """Build the network that is trained, with new weights or Stable Diffusion's."""
        return build_network(self.config, len(self.batches.classes), self.stack)

    def start(self, model: nn.Module, base: Base | None, fresh: bool) -> None:
        """Bring the built network to where training begins.

        base: the finished model that it begins with. fresh: no checkpoint follows.
        """
        if base is not None and (fresh or self.config.adapts):
            start_from(model, base, self.config)
            theirs = base.config.objective
            if fresh and theirs != self.config.objective:
                dist.log(
                    f"warning: {self.config.load_path} predicts {theirs}, and from here on it "
                    f"learns to predict {self.config.objective}; --objective {theirs} keeps it"
                )
        if self.config.class_prompt is not None:
            self.prior = finetune.prior_batches(self, model)
        self.trainable.prepare(model)

    def pipeline(self, model: nn.Module) -> Pipeline:
        """Put together what samples from the network as it is now."""
        conditioning = self.conditioning.of_networks(networks_of(model))
        scheduler = {} if self.stack is None else self.stack.scheduler
        parts = (self.schedule, self.codec, conditioning, self.device, scheduler)
        return Pipeline(self.config, model, *parts)

    def metadata(self, model: nn.Module) -> dict:
        """Describe in a checkpoint what its configuration does not."""
        about = {"classes": list(self.batches.classes)}
        if self.stack is not None:
            networks = networks_of(model)
            names = {"unet": "unet", "text_encoder": "text"}  # as checkpoints name them
            about["networks"] = {names[n]: net.config.to_dict() for n, net in networks.items()}
            about["frozen"] = self.frozen
        return about | self.trainable.metadata()

    @property
    def frozen(self) -> dict:
        """Describe what the network is trained beside and does not train."""
        return self.codec.digests | self.conditioning.digests | self.stack.digests

    def check_checkpoint(self, state: dict) -> None:
        """Raise UserError if a checkpoint was trained with other frozen networks or settings."""
        if self.stack is None:
            return
        names = check_digests(self.frozen, state.get("frozen"))
        unet = self.stack.unet
        if unet is not None and check_digests(unet.config.to_dict(), state["networks"]["unet"]):
            names.append("U-Net configuration")
        if names:
            raise UserError(
                f"the run in {self.config.save_folder} was trained with another "
                f"{' and '.join(names)} than there is now; bring that back, or train in "
                "another --save_folder (--overwrite deletes this run)"
            )

    # --- a step

    def shape(self, size: Size) -> tuple[int, int, int]:
        """Give (C, h, w) of the x0 of images of a size in pixels."""
        h, w = sides(size)
        return (self.codec.channels, h // self.codec.factor, w // self.codec.factor)

    def draw(self, step: int) -> list[Draw]:
        """Sample the random numbers of a step's global batch; with a prior those of both."""
        seeds = [self.config.seed]
        if self.prior is not None:
            seeds.append(seed_of(self.config.seed, "class"))
        progress = (step + 1) / total_steps(self.config, self.batches.length)
        size = self.config.image_size
        if self.config.aspect_buckets:
            size = self.batches.size_at(step)
        return [
            draw(self.config, self.schedule, self.shape(size), step, self.device, seed, progress)
            for seed in seeds
        ]

    def inputs_of(
        self, step: int, batch: Batch, draws: list[Draw], low: int, high: int
    ) -> "Inputs":
        """Put together what the loss of samples low ... high-1 of a step, in batch, needs.

        With a prior a class image stands beside each sample.
        """
        own = self.inputs(batch, draws[0][low:high])
        if self.prior is None:
            return own
        return own.beside(self.inputs(self.prior(step, low, high), draws[1][low:high]))

    def loss(self, network, inputs: "Inputs") -> Tensor:
        """Give the loss of each sample, (b,); with a prior its class image's is added."""
        losses = self.criterion(network, *inputs)
        if self.prior is None:
            return losses
        instance, prior = losses.chunk(2)
        return instance + self.config.prior_weight * prior

    @property
    def criterion(self) -> Callable:
        """Give what makes of a network and `Inputs` the loss of each sample."""
        if self.config.consistency:
            return consistency_loss
        return partial(training_loss, loss=self.config.loss)

    def inputs(self, batch: Batch, draw: Draw) -> "Inputs":
        """Put together what the loss of the samples of a batch needs."""
        x0 = self.codec.x0(batch, draw.vae_eps)
        cond = self.conditioning.of_batch(batch, draw.drop)
        if draw.augment is not None:
            x0 = augment(x0, draw.augment)
            cond = cond._replace(vector=draw.augment)
        return Inputs(draw.levels, x0, draw.eps, cond)

    # --- every few hundred steps

    def heldout_losses(self, network, low: int, high: int) -> Tensor:
        """Give (high - low,): the losses of held-out images, each at its fixed t and noise."""
        c = self.config
        n = len(self.batches.held_out)
        order = torch.randperm(n, generator=generator(c.seed, "held out t"))
        t = self.schedule.stratified_t(order, n)[low:high]
        levels = loss_coefficients(c, self.schedule, t).to(self.device)
        eps = heldout_noise(c.seed, low, high, self.shape(c.image_size))
        fixed = Draw(levels, eps.to(self.device), torch.zeros(high - low, dtype=torch.bool))
        batch = self.batches.held_out_batch(low, high)
        return self.criterion(network, *self.inputs(batch, fixed))

    def frames(self, model: nn.Module, indices):
        """Sample with the run's own settings: prompts in turn, or a block for each class."""
        c = self.config
        pipeline = self.pipeline(model)
        pipeline.guide = self.guide
        options = {}
        if pipeline.reads_prompts:
            options = pipeline.prompted(self.prompts, plain_prompts=True)(indices)
        elif pipeline.conditional:
            labels = [i * len(pipeline.classes) // c.num_samples for i in indices]
            options = {"labels": torch.tensor(labels)}
        return pipeline.frames(
            indices,
            seed=c.seed,
            sampler=c.sampler,
            steps=min(c.sample_steps, len(self.schedule)),
            guidance_scale=c.guidance_scale,
            guidance_interval=c.guidance_interval,
            amp=c.amp,
            **options,
        )

    def check(self, model: nn.Module) -> None:
        """Raise UserError now for settings that would end the first sample grid."""
        try:
            if self.config.num_samples:
                next(self.frames(model, [0]))
        except ValueError as error:
            raise UserError(f"sample grids: {error}") from None

    def sample_grid(self, model: nn.Module, micro: int) -> Image.Image | None:
        """Sample config.num_samples images, on all ranks; give them to rank 0, None elsewhere."""

        def sample(indices: list[int]) -> Tensor:
            states = self.frames(model, indices)
            for x, _ in states:  # noqa: B007
                pass
            return self.codec.decode(x)

        return grid_of_ranks(sample, self.config.num_samples, micro)


def open_recipe(config: Config, device: torch.device, base: Base | None = None) -> Recipe:
    """Open all that a configuration of --mode pixel or latent names.

    base: the model of --load_path. Raises UserError for what is missing or does not fit.
    """
    c = config
    stack = open_stack(c, device) if c.mode == "latent" else None
    codec = PixelCodec(device)
    schedule = path_of(c) if stack is None else stack.schedule
    if stack is not None:
        dtype = amp_dtype(c.amp, device)
        # the VAE's activations overflow float16
        codec = replace(stack.codec, amp=None if dtype == torch.float16 else dtype)
    trainable = finetune.open_trainable(c, stack)
    if any(side % codec.factor for side in sides(c.image_size)):
        raise UserError(
            f"image_size {size_text(c.image_size)} is no multiple of {codec.factor}, what this "
            "VAE divides it by"
        )
    batches = open_batches(c)
    if c.adapts and not c.streaming:
        batches = finetune.relabelled(c, batches, base)
    prompts = []
    if stack is not None:
        batches = encode_batches(c, batches, codec, stack.prompts)
        prompts = grid_prompts(c, batches, stack.prompts)
    conditioning = conditioning_of(c, batches.classes, device, stack and stack.prompts)
    guide = c.guide and load(c.guide, None, device, c.sd_path, vae=c.vae)
    parts = (batches, codec, conditioning, trainable)
    return Recipe(c, device, schedule, *parts, prompts, stack, guide=guide)


class Inputs(NamedTuple):
    """Hold what `training_loss` takes beside the network: b samples, levels (7, b) or (7, 2, b)."""

    levels: Tensor
    x0: Tensor
    eps: Tensor
    cond: Cond

    def tensors(self) -> tuple[Tensor, ...]:
        """List what is there."""
        return (*self[:3], *self.cond.tensors())

    def refilled(self, tensors: tuple[Tensor, ...]) -> "Inputs":
        """Put other tensors, in the order of `tensors`, in place of these."""
        return Inputs(*tensors[:3], self.cond.refilled(tensors[3:]))

    def beside(self, other: "Inputs") -> "Inputs":
        """Put other samples behind these."""
        levels = torch.cat([self.levels, other.levels], -1)
        pairs = zip(self.tensors()[1:], other.tensors()[1:])
        return self.refilled((levels, *map(torch.cat, pairs)))


def heldout_noise(seed: int, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Give the fixed noise of held-out images low ... high-1, (high - low, *shape)."""
    return torch.stack(
        [torch.randn(shape, generator=generator(seed, "held out", i)) for i in range(low, high)]
    )


@torch.no_grad()
def heldout_loss(recipe, model: nn.Module, micro: int) -> float:
    """Give the mean loss of the held-out images, which the ranks share."""
    n = len(recipe.batches.held_out)
    device = recipe.device
    dtype = amp_dtype(recipe.config.amp, device)
    total = torch.zeros((), device=device)
    for low in range(0, n, micro)[dist.rank() :: dist.world_size()]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            total += recipe.heldout_losses(model, low, min(low + micro, n)).sum()
    return float(dist.all_reduce_sum(total)) / n
