"""`python -m unclip.edits --model shapes --out model`: fit a PCA to the embeddings of a model's
CLIP, and write the model with it, for `sample.py pca`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip.config import one_line_errors, parse
from unclip.edits.principal import fit_pca
from unclip.pipeline import UnCLIP


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a PCA is fitted to a model's CLIP."""

    model: str = "shapes"
    """What `UnCLIP.from_pretrained` takes: a name, a folder, or `org/name` on the Hub."""
    data: str = "shapes"
    """`shapes`, pictures, or a folder of embeddings."""
    num_samples: int = 10_000
    """Embeddings to fit on, at the most."""
    out: Path = Path("model")
    """Folder to write the model into, its PCA with it; a new one."""


def main() -> None:
    """Fit a PCA to the embeddings of a model's CLIP, and write the model with it."""
    with one_line_errors():
        config = parse(FitConfig, sys.argv[1:], description=main.__doc__)
        model = UnCLIP.from_pretrained(config.model)
        model.pca = fit_pca(model, config.data, config.num_samples)
        half = model.pca.num_components(0.5), model.pca.num_components(0.99)
        print(f"half of the variance in {half[0]} components, 99% in {half[1]}")
        model.save_pretrained(config.out, torch.float16)


if __name__ == "__main__":
    main()
