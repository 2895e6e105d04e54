"""AdamW, on weights in the order in which they lie in memory."""

import torch
from torch import Tensor, nn


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

    def load_state_dict(self, state: dict) -> None:
        """Take the moments, also of the shape of their weights, as they once were saved.

        Settings are the configuration's. Raises ValueError for the moments of other weights:
        torch's kernel would write beyond their end.
        """
        moments = {}
        for i, values in state["state"].items():
            like = self.parameters[i]
            sizes = {"step": 1, "exp_avg": like.numel(), "exp_avg_sq": like.numel()}
            if sizes != {k: v.numel() for k, v in values.items()}:
                raise ValueError(f"the optimizer's state of weight {i} is not that of AdamW")
            moments[i] = {
                k: (flat(v, like) if v.shape == like.shape and k != "step" else v).clone()
                for k, v in values.items()
            }
        super().load_state_dict(self.state_dict() | {"state": moments})


def flat(x: Tensor, like: Tensor) -> Tensor:
    """x, of like's shape, in the order of like's memory: (like.numel(),); a view where x is so."""
    order = sorted(range(like.dim()), key=lambda i: -like.stride(i))
    return x.permute(order).flatten()
