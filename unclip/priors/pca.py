"""Principal components of image embeddings (paper, sections 2.2 and 3.3).

Shapes: S embeddings, D width of CLIP's joint space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PCA(nn.Module):
    """Principal components of true image embeddings, by decreasing variance.

    Attributes:
        mean: [D]. components: [D, D], a component a row. variance: [D], along each of them.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((embed_dim,), torch.nan))
        self.register_buffer("components", torch.full((embed_dim, embed_dim), torch.nan))
        self.register_buffer("variance", torch.full((embed_dim,), torch.nan))

    @classmethod
    def fit(cls, image_embed: Tensor) -> PCA:
        """The components of true image embeddings [S, D].

        Raises:
            ValueError: there are no more embeddings than dimensions.
        """
        num, dim = image_embed.shape
        if num <= dim:
            raise ValueError(
                f"principal components need more embeddings than their width, {dim}; got {num}: "
                f"use {10 * dim} or more"
            )
        pca = cls(dim).to(image_embed.device)
        centred = image_embed.double() - (mean := image_embed.double().mean(0))
        variance, vectors = torch.linalg.eigh(centred.T @ centred / (num - 1))  # increasing
        pca.mean = mean.float()
        pca.components = vectors.T.flip(0).float().contiguous()
        pca.variance = variance.flip(0).clamp(min=0).float()
        return pca

    def num_components(self, explained: float) -> int:
        """How many components hold this share, 0 to 1, of the variance."""
        if not 0 < explained <= 1:
            raise ValueError(f"explained must lie in (0, 1]; got {explained}: use 0.99")
        share = self.variance.double().cumsum(0) / self.variance.double().sum()
        return min(int((share < explained).sum()) + 1, len(share))

    def project(self, image_embed: Tensor) -> Tensor:
        """Coordinates [S, D] of embeddings [S, D]."""
        return (image_embed - self.mean) @ self.components.T

    def embed(self, coordinates: Tensor) -> Tensor:
        """The embeddings [S, D] of the first k coordinates [S, k]; the others are the mean's."""
        return coordinates @ self.components[: coordinates.shape[-1]] + self.mean

    def reconstruct(self, image_embed: Tensor, k: int) -> Tensor:
        """What the first k components keep of embeddings [S, D], as [S, D] (paper, section 3.3).

        Raises:
            ValueError: k is not among 1 .. D.
        """
        if not 1 <= k <= len(self.variance):
            raise ValueError(
                f"components must lie between 1 and {len(self.variance)}, as many as there are; "
                f"got {k}: use fewer"
            )
        return self.embed(self.project(image_embed)[..., :k])
