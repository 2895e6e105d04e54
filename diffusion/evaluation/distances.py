"""Distances between sets of images, as pure functions of their features.

Features are (N, D), float64 on the CPU.
"""

import numpy as np
import torch
from torch import Tensor

from ..runtime import distributed as dist

FEW = 2048  # images below which a Fréchet distance says little; Inception has as many features
# what the numbers in results mean; "X" is the network whose features were taken
DEFINITIONS = {
    "frechet": "Frechet distance of the features' Gaussians, arXiv:1706.08500 eq. 6 (FID where X "
    "is Inception); lower is nearer",
    "kid": "squared MMD of the kernel (x.y / D + 1)^3, unbiased, arXiv:1801.01401; lower is nearer",
    "precision": "share of generated images inside the real images' manifold (Kynkaanniemi et al. "
    "2019, k = 3)",
    "recall": "share of real images inside the generated images' manifold (the same, k = 3)",
    "inception_score": "exp E KL(p(y|x) || p(y)), arXiv:1606.03498, mean over ten parts",
}


class Moments:
    """Mean and covariance of features that come in pieces, on several ranks."""

    def __init__(self, dim: int):
        self.n = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def reduce(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)) of what all ranks have added."""
        for part in (self.n, self.sum, self.outer):
            dist.all_reduce_sum(part)
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased covariance) of (N, D) features, N > 1."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), arXiv:1706.08500 eq. 6.

    The root's trace is that of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), which is symmetric.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = mean_a - mean_b
    return float(mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, most: int = 1000, seed: int = 0
) -> float:
    """KID: the squared MMD of kernel (x.y / D + 1)^3, unbiased (arXiv:1801.01401, section 4).

    The mean over random subsets of at most `most` images, drawn as clean-fid draws them.
    """
    random = np.random.RandomState(seed)
    D = real.shape[1]
    m = min(len(real), len(fake), most)
    total = 0.0
    for _ in range(subsets):
        x = fake[random.choice(len(fake), m, replace=False)]
        y = real[random.choice(len(real), m, replace=False)]
        same = (x @ x.T / D + 1) ** 3 + (y @ y.T / D + 1) ** 3
        across = (x @ y.T / D + 1) ** 3
        total += float(
            (same.sum() - same.diagonal().sum()) / (m * (m - 1)) - 2 * across.sum() / m**2
        )
    return total / subsets


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of one set inside the other's manifold (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set's manifold: the balls around its points that reach their k-th nearest neighbour.
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cat(
            [
                torch.cdist(part, manifold).kthvalue(k + 1, dim=1).values
                for part in manifold.split(1024)
            ]
        )
        hit = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1024)]
        return float(torch.cat(hit).double().mean())

    return inside(fake, real), inside(real, fake)


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over splits of exp(E KL(p(y|x) || p(y))), arXiv:1606.03498 section 4."""
    order = np.random.RandomState(0).permutation(len(probabilities))  # files may come by class
    scores = []
    probabilities = probabilities[order]
    for p in probabilities.tensor_split(min(splits, len(probabilities))):
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))
