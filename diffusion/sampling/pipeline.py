"""A model as something to sample from: network, noise path, codec and conditioning.

model = diffusion.load("results/model.pt")
images = model.sample(16, steps=20)                    # (16, 3, H, W) in [-1, 1]
"""

import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import UserError, shown, some
from ..config import POSITIVE, Config, check_bounds, sides
from ..data.latents import weights_digest
from ..files.sd_files import spacing_of
from ..files.table_files import read_table
from ..models.build import for_inference, state_of
from ..models.cond import Cond
from ..models.configs import MAX_SIDE
from ..models.cuda import works
from ..models.text_unet import networks_of
from ..process.loop import Inpaint, differentiable_loop, guided, sample_loop
from ..process.names import DEFAULT_SAMPLER, DEFAULT_STEPS, PROMPT_SCALE
from ..process.objective import Denoiser
from ..process.samplers import Table, make_table
from ..process.schedule import NoisePath
from ..runtime import compiler
from ..runtime.cuda_graph import Graphs
from ..runtime.distributed import progress
from ..runtime.precision import amp_dtype
from ..runtime.seeding import ImageNoise
from .codec import LatentCodec, PixelCodec
from .conditioning import ClassLabels, Prompts, Request, Unconditional
from .image_tensor import Images
from .init_image import INPAINTS, Picture, read_init_image

TABLE = ("sampler", "steps", "spacing", "eta", "churn", "shift")  # what `Pipeline.table` takes
# options of `Pipeline.frames` with a row for each image
EACH = ("labels", "prompts", "negative_prompts", "eps", "init", "mask", "kept")


@dataclass(eq=False)
class Pipeline:
    """Sample from a trained module, with all that this needs.

    model: what was trained: a U-Net, or one with its text encoder.
    scheduler: what a scheduler_config.json says of timesteps; {} without one.
    height, width: of the images, in pixels; None: the size that the model was trained on.
    compiled: whether to torch.compile the network, and the guide's.
    guide: what guidance leads away from, in place of the model without its condition: a worse
    model of the same kind (arXiv:2406.02507), see `check_guide`.
    Raises UserError for sizes that the codec cannot make.
    """

    config: Config
    model: nn.Module
    schedule: NoisePath
    codec: PixelCodec | LatentCodec = PixelCodec()
    conditioning: Unconditional | ClassLabels | Prompts = Unconditional()
    device: torch.device = torch.device("cpu")
    scheduler: dict = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    compiled: bool = False
    guide: "Pipeline | None" = None
    graphs: Graphs = field(default_factory=Graphs, repr=False)
    ready: dict[tuple, tuple] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        height, width = sides(self.config.image_size)
        side = max(height, width)
        if side > MAX_SIDE and not (self.height and self.width):
            raise UserError(
                f"the model says that its images have {side:,} pixels a side; expected at most "
                f"{MAX_SIDE:,}, or --height and --width"
            )
        self.set_size(self.height or height, self.width or width)

    def set_size(self, height: int, width: int) -> None:
        """Choose the images' size in pixels. Raises UserError for what the codec cannot make."""
        factor = self.codec.factor
        for name, side in (("height", height), ("width", width)):
            if side % factor or side < factor:
                low = max(factor, side // factor * factor)
                raise UserError(
                    f"{name} is {side}; it must be a multiple of {factor}, such as {low} or "
                    f"{low + factor}"
                )
        self.height = height
        self.width = width

    # --- what kind of model it is

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Name the networks that adapters go into: unet, and text_encoder if it reads text."""
        own = networks_of(self.model)
        if self.reads_prompts:
            own = {"text_encoder": self.conditioning.encoder} | own
        return own

    @property
    def inpaints(self) -> bool:
        """Tell whether the network reads a mask and the latents of what it keeps, behind x."""
        sizes = getattr(networks_of(self.model)["unet"], "config", None)
        return sizes is not None and sizes.in_channels > self.codec.channels

    @property
    def conditional(self) -> bool:
        """Tell whether the network is conditioned on a class."""
        return self.config.condition == "class"

    @property
    def reads_prompts(self) -> bool:
        return self.config.condition == "text"

    @property
    def classes(self) -> Sequence[str]:
        """List the names of the classes, in label order."""
        return self.conditioning.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Give (C, h, w) of x0."""
        factor = self.codec.factor
        return (self.codec.channels, self.height // factor, self.width // factor)

    @property
    def clip_skip(self) -> int | None:
        """Tell which layer of a text encoder is read, from the end; None where that is the last."""
        skip = self.conditioning.skip if self.reads_prompts else 1
        return skip if skip > 1 else None

    def precision(self, amp: str) -> str:
        """Name the floating-point type that the network computes in."""
        dtype = next(self.model.parameters()).dtype
        if dtype == torch.float32:
            dtype = amp_dtype(amp, self.device) or dtype
        return str(dtype).removeprefix("torch.")

    # --- sampling

    def frames(
        self,
        indices,
        *,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        churn: float = 0.0,
        shift: float | None = None,
        strength: float = 1.0,
        table: Table | None = None,
        labels: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        chunks: int | None = None,
        plain_prompts: bool | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        batched: bool = True,
        eps: Tensor | None = None,
        init: Tensor | None = None,
        mask: Tensor | None = None,
        kept: Tensor | None = None,
        amp: str = "auto",
        cuda_graph: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample the images with these indices; yields (x_s, x0) after each row of the table.

        x0 is what the row predicted from the state before it, clipped for pixels, and x_s the state
        that it made of that (y' of a table with two states); the first noise is not yielded.

        Image i of a seed starts from the same noise whatever stands beside it. steps: None means
        20, or all of a shorter schedule. table: what is run, in place of sampler, steps, spacing,
        eta, churn, shift and strength; with gradients, where its numbers require them.
        labels, prompts, negative_prompts, chunks, plain_prompts: see `conditioning.Request`.
        guidance_interval: the lowest and the highest sigma / alpha that are guided; all other rows
        call the network once, with its condition (arXiv:2404.07724).
        batched: guidance evaluates both in one call, unless there is a guide; else in two, in half
        the memory.
        eps: the noise to start from instead, (B, C, h, w).
        init: what `encode` gives, noised for the last `strength` of the steps, SDEdit
        (arXiv:2108.01073); with a mask (B, 1, h, w) it stays where the mask is 0, and at
        strength 1 nothing of it is in the noise that the rest starts from.
        kept: what `encode` gives for the image without what the mask repaints; a model that
        inpaints needs all three, and decides itself what stays.
        cuda_graph: each step is one launch, captured at the first call with its settings.
        Raises ValueError for settings that do not go together.
        """
        if table is None:
            table = self.table(sampler, steps, spacing, eta, strength, churn, shift)
        table = table.guided(guidance_scale, guidance_interval)
        noise = ImageNoise(seed, indices, self.shape)

        def draw() -> Tensor:
            return noise(self.device).contiguous(memory_format=torch.channels_last)

        start = draw()  # also where another noise is given: the rows' noise is then the same
        eps = start if eps is None else eps.to(self.device)
        alpha, sigma = table.levels[0].tolist()
        x = self.schedule.prior_std(alpha, sigma) * eps
        inpaint = None
        if self.inpaints and (init is None or mask is None or kept is None):
            raise UserError(INPAINTS)
        if init is not None:
            if mask is None or table.strength < 1:
                x = alpha * init.to(self.device) + sigma * eps
            if mask is not None and not self.inpaints:
                inpaint = Inpaint(init.to(self.device), mask.to(self.device), eps)
        dtype = amp_dtype(amp, self.device)
        request = Request(len(x), labels, prompts, negative_prompts, chunks, plain_prompts, dtype)
        guides = guidance_scale != 1
        guide = self.guide if guides else None
        cond, uncond = self.conditioning.of_request(request, guides and guide is None)
        if guide is not None:
            check_guide(self, guide)
            guide.compiled = self.compiled
            uncond, _ = guide.conditioning.of_request(request, False)
        if self.inpaints:
            image = torch.cat([mask, kept], 1).to(self.device).expand(len(x), -1, -1, -1)
            cond, uncond = (one._replace(image=image) for one in (cond, uncond))
        kind = (self.schedule, self.config.objective)
        network = self.network(cond, dtype)
        other = guide and guide.network(uncond, dtype)
        both = guided(network, other, guidance_rescale, batched)
        capture = None
        if cuda_graph:
            # a network that has changed is another one
            key = (network.network, other and other.network, guidance_rescale, batched)
            capture = lambda run, what: self.graphs.wrap(run, (*key, *what))  # noqa: E731
        loop = differentiable_loop if table.to_x.requires_grad else sample_loop
        return loop(
            Denoiser(network, *kind),
            x,
            table,
            cond=cond.tensors(),
            guided=Denoiser(both, *kind, weighted=True),
            uncond=uncond.tensors(),
            noise=draw,
            clip=self.codec.clip,
            inpaint=inpaint,
            capture=capture,
        )

    def sample_batch(self, indices, **options) -> Tensor:
        """Decode the last x of `frames`: (B, 3, H, W) float32 in [-1, 1]."""
        states = self.frames(indices, **options)
        for x, _ in states:  # noqa: B007
            pass
        return self.decode(x)

    def sample(
        self,
        what: int | str | Sequence[int] | Sequence[str] = 1,
        *,
        class_label: str | int | None = None,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        init_image: Picture | None = None,
        mask: Picture | Tensor | None = None,
        strength: float | None = None,
        batch_size: int = 16,
        **options,
    ) -> Images:
        """Sample images, (n, 3, H, W) float32 in [-1, 1]; `.pil()` and `.grid()` make pictures.

        what: how many; or prompts, for an image each; or the images' indices: image i of a seed is
        always the same. class_label: a class's name or number; "all": the classes in turn.
        guidance_scale: None means 7.5 with prompts, a learned table's own, else 1: no guidance.
        init_image: a file or a Pillow image to start from, noised for the last `strength` of the
        steps (None: 0.8; 1 with a model that inpaints); mask: another, white where to repaint.
        options: sampler, steps, seed, spacing, guidance_interval, ..., see `frames`.
        Raises UserError for what the model has no use for, and files that cannot be read.
        """
        counted = isinstance(what, numbers.Integral)
        what = [what] if isinstance(what, str) else what if counted else list(what)
        sizes = {"the number of images": what if counted else len(what), "batch_size": batch_size}
        check_bounds(sizes, dict.fromkeys(sizes, POSITIVE))
        texts = not counted and isinstance(what[0], str)
        indices = what if not counted and not texts else range(sizes["the number of images"])
        started = init_image is not None or options.get("init") is not None
        if not started and (strength is not None or mask is not None):
            raise UserError("strength, mask: no effect without init_image")
        if isinstance(mask, Tensor):
            options["mask"] = mask
            mask = None
        plain = options.pop("plain_prompts", None) if texts else None
        size = (self.height, self.width)
        given = size if size != sides(self.config.image_size) else (None, None)
        prompts = what if texts else None
        try:
            of_image = self.options_of(
                prompts, negative_prompt, plain, class_label, init_image, mask, *given
            )
            if strength is None:
                strength = self.usual_strength(init_image)
            kind = {name: options.pop(name) for name in TABLE if name in options}
            table = options.pop("table", None) or self.table(strength=strength, **kind)
            if guidance_scale is None and table.spacing == "learned":
                guidance_scale = table.weight[0].item()
            elif guidance_scale is None:
                guidance_scale = PROMPT_SCALE if texts or options.get("prompts") else 1.0
            same = {"cuda_graph": self.device.type == "cuda", "table": table} | options
            rows = {name: options[name] for name in EACH if options.get(name) is not None}
            each = {name: given for name, given in rows.items() if len(given) == len(indices)}
            images = []
            bars = dict(total=len(indices) * len(table), unit="step", leave=False, delay=2)
            with progress(**bars) as bar:
                for low in range(0, len(indices), batch_size):
                    part = indices[low : low + batch_size]
                    own = {name: given[low : low + batch_size] for name, given in each.items()}
                    own |= {"guidance_scale": guidance_scale} | of_image(part)
                    for x, _ in self.frames(part, **same | own):  # noqa: B007
                        bar.update(len(part))
                    images.append(self.decode(x))
        finally:
            self.set_size(*size)  # an init image brings its own
        return torch.cat(images).as_subclass(Images)

    def table(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        strength: float = 1.0,
        churn: float = 0.0,
        shift: float | None = None,
    ) -> Table:
        """Make what `frames` runs; a model's own scheduler, if any, spaces the timesteps.

        sampler: a name, or the .json file of a learned table, which has all but its guidance; None
        means the best that was measured, in 20 steps unless given; for a model of --consistency
        lcm, in 2. shift: None means that of training.
        Raises UserError for a table of another model, and for other options beside one.
        """
        if self.config.consistency and sampler in (None, "lcm"):
            sampler = "lcm"
            steps = 2 if steps is None else steps
        sampler = str(sampler or DEFAULT_SAMPLER)
        if sampler.endswith(".json"):
            table, model = read_table(Path(sampler))
            if (steps, spacing, eta, strength) != (None, None, None, 1.0):
                raise UserError(
                    f"{sampler} has its own {len(table)} steps from noise to picture: it takes no "
                    "--steps, --spacing or --eta, and an --init_image at --strength 1 only"
                )
            if model != weights_digest(self.model):
                raise UserError(
                    f"{sampler} was learned for another model, or for other weights of this one "
                    "(raw, or with a LoRA): learn one for it, python -m diffusion.learn_table"
                )
            return table
        steps = min(DEFAULT_STEPS, len(self.schedule)) if steps is None else steps
        shift = self.config.noise_shift if shift is None else shift
        options = dict(strength=strength, eta=eta, spacing=spacing, churn=churn, shift=shift)
        if spacing is None and self.scheduler:
            options["spacing"] = spacing_of(self.scheduler)
        if self.scheduler and options["spacing"] == "leading":
            options["offset"] = self.scheduler["steps_offset"]
        if sampler == "ddim" and self.scheduler and not self.scheduler["set_alpha_to_one"]:
            options["final"] = "alpha_bar_0"  # as CompVis; diffusers' others end at 0
        return make_table(self.schedule, sampler, steps, **options)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into x0."""
        return self.codec.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """Turn x0 into images (B, 3, H, W) float32."""
        return self.codec.decode(x)

    # --- classes and prompts by name

    def labels(self, choice: str | None, indices) -> Tensor | None:
        """Find the class labels of images `indices`, (B,), by a class's name or number.

        Names come first. Where a class has a number for a name, "9" is that name and no position.
        "all", unless it is a name: the classes in turn. Raises UserError for an unknown class.
        """
        if choice is None:
            return None
        if self.reads_prompts:
            raise UserError("class_label: this model reads prompts, not classes: give --prompt")
        choice = str(choice)
        names = list(self.classes)
        if choice in names:
            return torch.full((len(indices),), names.index(choice))
        if choice == "all" and names:
            return torch.tensor([i % len(names) for i in indices])
        numbered = not any(map(is_number, names))
        if numbered and is_number(choice) and int(choice) < len(names):
            return torch.full((len(indices),), int(choice))
        known = [f"{i} {name}" for i, name in enumerate(names)] if numbered else names
        raise UserError(
            f"class_label {shown(choice)} is unknown; the model's classes are "
            f"{some(known, 100) or 'none: it is unconditional'}"
        )

    def labels_in_turn(self, indices) -> Tensor | None:
        """Give the class labels of images `indices`, (B,), the classes in turn; None without."""
        if not self.conditional:
            return None
        return torch.tensor([i % len(self.classes) for i in indices])

    def usual_strength(self, init_image: Picture | None) -> float:
        """Tell which part of the steps is run where that is not said: less on an init image."""
        return 1.0 if init_image is None or self.inpaints else 0.8

    def options_of(
        self,
        prompts: Sequence[str] | None = None,
        negative: str = "",
        plain_prompts: bool | None = None,
        class_label: str | None = None,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Callable[..., dict]:
        """Make a function of indices that gives the options of `frames` for these images.

        See `prompted`, `labels` and `read_init_image`; None leaves a part out.
        """
        if negative and not prompts:
            raise UserError("negative_prompt: no effect without prompts")
        turn = self.prompted(prompts, negative, plain_prompts) if prompts else None
        start = read_init_image(self, init_image, mask, height, width)

        def options(indices) -> dict:
            own = {} if class_label is None else {"labels": self.labels(class_label, indices)}
            own |= {name: x.expand(len(indices), *x.shape[1:]) for name, x in start.items()}
            return own if turn is None else own | turn(indices)

        return options

    def prompted(
        self, prompts: Sequence[str], negative: str = "", plain_prompts: bool | None = None
    ) -> Callable[..., dict]:
        """Make a function of indices that gives the options of `frames` for prompts in turn.

        plain_prompts: see `conditioning.Request`. Raises UserError for a model that reads none.
        """
        if not self.reads_prompts:
            raise UserError("this model reads no text: it takes no prompts")
        return self.conditioning.in_turn(prompts, negative, plain_prompts)

    # --- the network, ready for sampling

    def forget(self) -> None:
        """Drop what was folded, compiled or captured of the model: it has changed."""
        self.graphs.graphs.clear()
        self.ready.clear()

    def inference_network(self, dtype: torch.dtype | None) -> nn.Module:
        """Prepare the network that runs at every step, once for as long as its weights stay.

        All calls, batch sizes and graphs share it. What changes weights behind torch's back, such
        as a training step that is replayed as a CUDA graph (see `build.state_of`), must be followed
        by `forget`, or by a new pipeline: the trainer makes one for each of its sample grids.
        """
        unet = networks_of(self.model)["unet"]
        state, views = state_of(unet)
        key = (dtype, self.compiled)
        if key in self.ready and self.ready[key][0] != state:
            self.forget()
        if key not in self.ready:
            network = for_inference(unet, dtype)
            if self.compiled:
                compiler.prepare(self.device)
                works(next(network.parameters()).device)
                network.compile(dynamic=False)
            self.ready[key] = (state, views, network)
        return self.ready[key][-1]

    def network(self, cond: Cond, dtype: torch.dtype | None) -> Callable[..., Tensor]:
        """Make the network a function (x, t, *tensors) of tensors like those in cond.

        A network in float32 runs under autocast in dtype, another in its own precision.
        """
        own = next(self.model.parameters()).dtype
        dtype = dtype if own == torch.float32 else None
        network = self.inference_network(dtype)

        def call(x: Tensor, t: Tensor, *tensors: Tensor) -> Tensor:
            cast = (
                v.to(own) if v.is_floating_point() and own != torch.float32 else v for v in tensors
            )
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return network(x.to(own), t, cond.refilled(cast))

        call.network = network
        return call


# what a model and its guide have in common, of their configurations
KIND = (
    "mode",
    "image_size",
    "condition",
    "objective",
    "path",
    "time_steps",
    "schedule",
    "zero_snr",
    "sigma_data",
)


def check_guide(pipeline: Pipeline, guide: Pipeline) -> None:
    """Raise UserError for a guide whose output means something else than the model's.

    Sizes, weights and data may differ; what the networks are given and what they predict may not,
    nor the classes of those with labels.
    """
    mine, others = (
        {name: getattr(one.config, name) for name in KIND}
        | {"channels": one.shape[0], "classes": one.conditional and list(one.classes)}
        for one in (pipeline, guide)
    )
    for name, value in mine.items():
        if others[name] != value:
            raise UserError(
                f"the guide's {name} is {shown(others[name])}, the model's {shown(value)}: a guide "
                "is a model of the same kind, such as an earlier checkpoint, or a run with a "
                "smaller --unet_dim"
            )


def is_number(text: str) -> bool:
    """Tell whether a text is a whole number in plain digits."""
    return text.isascii() and text.isdigit() and len(text) < 20
