"""Randomness as a function of names: no generator state is ever stored.

Every random number of the program comes from a generator that is seeded by its purpose,
`generator(seed, "noise", step)` or `generator(seed, "image", i)`. A resumed run, another world
size and another batch size therefore see the same numbers.
"""

import hashlib

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """Make a 63-bit seed of integers and strings, the same on all machines and versions."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator that depends on the key only."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Make a permutation (n,) int64 of 0..n-1 that depends on the key only."""
    return np.random.Generator(np.random.PCG64(seed_of(*key))).permutation(n)


class ImageNoise:
    """Standard normal noise for images with an index each; image i of a seed always gets the same.

    Sampled in float32 on the CPU, an image at a time, so that it depends neither on the device nor
    on the other images of the batch. Every call continues each image's own stream. A GPU gets it
    from pinned memory, for which nothing waits: the host runs ahead of the device.
    """

    def __init__(self, seed: int, indices, shape: tuple[int, ...]):
        self.generators = [generator(seed, "image", int(i)) for i in indices]
        self.shape = tuple(shape)

    def __call__(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Sample (B, *shape) float32."""
        cuda = torch.device(device).type == "cuda"
        # new at each call: torch uses pinned memory again when its last copy is done
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=cuda)
        for row, g in zip(noise, self.generators):
            row.normal_(generator=g)
        return noise.to(device, non_blocking=cuda)
