"""A small feature network for tests: the CIFAR-10 ResNet-56 (He et al. 2016), as TorchScript.

python tests/resnet56.py WEIGHTS.safetensors OUT.pt      for --fid_features OUT.pt
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, self.pad = stride, (c_out - c_in) // 2
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], [0, 0, 0, 0, self.pad, self.pad])
        return F.relu(x + h)


class ResNet56(nn.Module):
    """uint8 (N, 3, H, W) -> (N, 112): the three stages, averaged over positions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(9)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32, 1) for _ in range(8)])
        self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64, 1) for _ in range(8)])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.float() / 255 - self.mean) / self.std
        a = self.layer1(F.relu(self.bn1(self.conv1(x))))
        b = self.layer2(a)
        return torch.cat([h.mean((2, 3)) for h in (a, b, self.layer3(b))], 1)


def write(weights: str | None, out: str) -> None:
    """weights None: random ones."""
    network = ResNet56().eval()
    if weights is not None:
        from safetensors.torch import load_file

        tensors = load_file(weights)
        missing, _ = network.load_state_dict(tensors, strict=False)
        assert {m.split(".")[-1] for m in missing} <= {"mean", "std", "num_batches_tracked"}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(network).save(out)


if __name__ == "__main__":
    write(*sys.argv[1:])
