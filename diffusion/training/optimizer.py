"""AdamW and Muon, on weights in the order in which they lie in memory."""

import torch
from torch import Tensor, nn

from ..config import Config

MOMENTUM = 0.95  # of Muon
NARROW = 16  # channels, below which a layer is the network's first or last, and AdamW's


class AdamW(torch.optim.AdamW):
    """Run torch's fused AdamW (arXiv:1711.05101) without its copies of channels_last weights.

    On a CPU its kernel takes whatever is not contiguous through copies and back at every step, for
    half of its time. So it is handed the weights, and their gradients, as flat views of memory.
    """

    def __init__(self, parameters, learning_rate: float, **options):
        self.parameters: list[nn.Parameter] = list(parameters)
        views = [flat(p.detach(), p).view(-1) for p in self.parameters]
        on_gpu = views[0].is_cuda
        super().__init__(views, learning_rate, fused=True, capturable=on_gpu, **options)
        if on_gpu:  # where a CUDA graph reads it
            self.param_groups[0]["lr"] = torch.tensor(learning_rate, device=views[0].device)

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the next steps."""
        group = self.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value

    def take_gradients(self) -> list[Tensor]:
        """Take the gradients off the parameters; to be called before each step."""
        taken = []
        for p, view in zip(self.parameters, self.param_groups[0]["params"]):
            view.grad = None if p.grad is None else flat(p.grad, p)
            taken += [] if p.grad is None else [view.grad]
            p.grad = None
        return taken

    def sizes(self, parameter: nn.Parameter) -> dict[str, int]:
        """Give the numbers of elements of what is kept of a parameter."""
        return {"step": 1, "exp_avg": parameter.numel(), "exp_avg_sq": parameter.numel()}

    def load_state_dict(self, state: dict) -> None:
        """Take the moments, also of the shape of their weights, as they once were saved.

        Settings are the configuration's. Raises ValueError for the moments of other weights:
        torch's kernel would write beyond their end.
        """
        moments = {}
        for i, values in state["state"].items():
            like = self.parameters[i]
            if self.sizes(like) != {k: v.numel() for k, v in values.items()}:
                raise ValueError(
                    f"the optimizer's state of weight {i} is not that of {type(self).__name__}"
                )
            moments[i] = {
                k: (flat(v, like) if v.shape == like.shape and k != "step" else v).clone()
                for k, v in values.items()
            }
        super().load_state_dict(self.state_dict() | {"state": moments})


class Muon(AdamW):
    """Move matrices by Muon (Jordan et al. 2024), and all else by AdamW.

    A matrix, or the weights of a convolution as one of (C_out, rest), moves by its averaged
    gradient with singular values near 1, times 0.2 sqrt(its longer side): as far as AdamW would
    (arXiv:2502.16982). It needs half of AdamW's memory. matrices: those of the parameters.
    """

    def __init__(self, parameters, learning_rate: float, matrices: list[nn.Parameter], **options):
        super().__init__(parameters, learning_rate, **options)
        self.matrices = set(matrices)

    def sizes(self, parameter: nn.Parameter) -> dict[str, int]:
        if parameter in self.matrices:
            return {"step": 1, "momentum": parameter.numel()}
        return super().sizes(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        """Step; where found_inf is 1, nothing changes."""
        [group] = self.param_groups
        ok = 1 - getattr(self, "found_inf", torch.zeros((), device=group["params"][0].device))
        rate = group["lr"] * ok
        alike = {}  # by shape: weights
        for parameter, view in zip(self.parameters, group["params"]):
            if parameter in self.matrices and view.grad is not None:
                shape = (len(parameter), parameter.numel() // len(parameter))
                alike.setdefault(shape, []).append(view)
        for shape, views in alike.items():
            for view in views:
                if not self.state[view]:
                    step = torch.zeros_like(ok)  # torch asks for it
                    self.state[view] |= {"step": step, "momentum": torch.zeros_like(view)}
            torch._foreach_add_([self.state[view]["step"] for view in views], [ok] * len(views))
            momenta = [self.state[view]["momentum"] for view in views]
            averages = torch.stack(momenta)
            gradients = torch.where(ok > 0, torch.stack([view.grad for view in views]), averages)
            averages.lerp_(gradients, 1 - MOMENTUM)
            torch._foreach_copy_(momenta, averages.unbind())
            matrices = gradients.lerp_(averages, MOMENTUM).view(-1, *shape)
            directions = orthogonal(matrices) * (0.2 * max(shape) ** 0.5 * rate)
            if group["weight_decay"]:
                torch._foreach_mul_(views, [1 - rate * group["weight_decay"]] * len(views))
            torch._foreach_sub_(views, directions.flatten(1).unbind())
            for view in views:
                view.grad = None  # AdamW passes over it
        return super().step(closure)


def orthogonal(x: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, R, C) near to 1, from 0.7 to 1.2; small ones less.

    That is five times X <- (a + b A + c A^2) X with A = X X^T (Newton-Schulz). All of these factors
    and A commute, so that X is multiplied once, with their product. float32 is needed: coarser
    rounding makes small eigenvalues of A negative, and these grow.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = factor = factor_of(gram)
    for _ in range(4):
        gram = factor @ factor @ gram
        factor = factor_of(gram)
        product = factor @ product
    return product @ x


def factor_of(gram: Tensor) -> Tensor:
    """Give a + b A + c A^2 of A (N, R, R)."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor


def open_optimizer(config: Config, model: nn.Module) -> AdamW:
    """Make the optimizer of a model's trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    options = dict(betas=(0.9, 0.99), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(trained, config.learning_rate, **options)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in trained if p.dim() > 1 and min(p.shape[:2]) >= NARROW]
    return Muon(trained, config.learning_rate, [p for p in matrices if p not in tables], **options)


def flat(x: Tensor, like: Tensor) -> Tensor:
    """x, of like's shape, in the order of like's memory: (like.numel(),); a view where x is so."""
    order = sorted(range(like.dim()), key=lambda i: -like.stride(i))
    return x.permute(order).flatten()
