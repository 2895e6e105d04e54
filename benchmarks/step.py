"""A training step of the trainer's own, on images or latents of noise, for benchmarks."""

import sys

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.config import Config  # noqa: E402
from diffusion.models.cond import NOTHING, Cond  # noqa: E402
from diffusion.process.objective import training_coefficients, training_loss  # noqa: E402
from diffusion.process.schedule import make_schedule  # noqa: E402
from diffusion.training.ema import EMA  # noqa: E402
from diffusion.training.optimizer import AdamW  # noqa: E402
from diffusion.training.recipe import Inputs  # noqa: E402
from diffusion.training.steps import StepStats  # noqa: E402
from diffusion.training.train_step import TrainStep  # noqa: E402


class Synthetic:
    """What a training step asks of a recipe, with the same inputs at each."""

    config = Config(data="toy")

    def __init__(self, x0: torch.Tensor, cond: Cond):
        self.device = x0.device
        g = torch.Generator().manual_seed(1)
        t = torch.randint(1000, (len(x0),), generator=g)
        levels = training_coefficients(make_schedule("cosine", 1000), "v", t)
        eps = torch.randn(x0.shape, generator=g)
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        self.inputs = Inputs(levels.to(x0.device), x0, eps.to(x0.device), cond)

    @staticmethod
    def loss(network, inputs: Inputs) -> torch.Tensor:
        return training_loss(network, *inputs)


class Step:
    """A training step of x0 (B, C, H, W), in bf16. one_pass: False for the update without Triton."""

    def __init__(
        self,
        network: torch.nn.Module,
        x0: torch.Tensor,
        cond: Cond = NOTHING,
        one_pass: bool = True,
    ):
        self.network = network
        self.one_pass = one_pass
        self.batch = len(x0)
        self.recipe = Synthetic(x0, cond)
        self.optimizer = AdamW(network.parameters(), 1e-4, betas=(0.9, 0.99))
        self.ema = EMA(network, 0.9999)
        self.ema.begin(10**6)
        self.use_graph(False)

    def use_graph(self, graph: bool) -> None:
        """Choose how it runs: kernel by kernel, or as a CUDA graph from the fourth call on."""
        device = self.recipe.device
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        parts = (self.network, self.optimizer, scaler, self.ema, StepStats(device))
        self.step = None  # before another is made: a graph holds its memory
        self.step = TrainStep(self.recipe, *parts, torch.bfloat16, graph=graph)
        if not self.one_pass:
            self.step.one_pass = None

    def __call__(self) -> None:
        self.step([self.recipe.inputs])

    def update_alone(self):
        """Make a call that clips, updates weights and averages them, for gradients that stay."""
        gradients = [torch.randn_like(p) for p in self.network.parameters()]

        def update() -> None:
            for p, gradient in zip(self.network.parameters(), gradients):
                p.grad = gradient
            self.step.update()

        return update
