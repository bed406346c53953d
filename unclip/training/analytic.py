"""Measure what a diffusion prior's `analytic` sampler (Bao et al. 2022; paper, Table 3) needs:

    python -m unclip.training.analytic --model runs/prior --data shapes

writes `diffusion.eps_power` into the config of the prior in that folder; its weights stay as they
are. Then `python sample.py --model runs/prior --prior-sampler analytic` draws with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from unclip.checkpoint import CONFIG_NAME
from unclip.config import one_line_errors, parse
from unclip.data.source import SourceConfig, open_source
from unclip.diffusion import NoiseSchedule, measure_eps_power
from unclip.hub import load_stages
from unclip.priors import DiffusionPrior
from unclip.training.prior import spread_rows


@dataclass(frozen=True, kw_only=True)
class AnalyticConfig:
    """What is measured, and on what."""

    model: Path = Path("runs/prior")
    """Folder of a model or run whose prior lies in its sub-folder `prior`."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """What it was trained on."""
    num: int = 512
    """Captioned pictures (or rows of embeddings) at each timestep."""
    num_knots: int = 32
    """Timesteps measured; between them it is interpolated."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        for name, least in (("num", 1), ("num_knots", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")


@torch.no_grad()
def measure(config: AnalyticConfig) -> tuple[float, ...]:
    """Mean square of the noise estimates at each knot, written into the prior's config."""
    path = config.model / "prior" / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"model must be a folder with a prior in its sub-folder `prior`; got {config.model}: "
            "pass a training run's folder"
        )
    stages = load_stages(config.model, only={"clip", "prior"})
    clip, prior = stages.clip, stages.prior
    assert clip is not None and prior is not None
    if not isinstance(prior, DiffusionPrior):
        raise ValueError(f"model must hold a diffusion prior; got one of kind {prior.kind}")
    dataset: Any = open_source(config.source)
    samples = [dataset[row] for row in spread_rows(dataset, config.num)]
    text = clip.encode_text([sample["caption"] for sample in samples]).trimmed()
    context = prior.encode_context(text, empty=clip.null_text(prior.config.network.null_text))
    power = measure_eps_power(
        prior.network,
        NoiseSchedule(prior.config.diffusion),
        prior.normalize(clip.encode_samples(samples)),
        context,
        torch.Generator().manual_seed(config.seed),
        config.num_knots,
    )
    values = yaml.safe_load(path.read_text())
    values["diffusion"]["eps_power"] = [round(value, 6) for value in power]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(yaml.safe_dump(values, sort_keys=False))
    os.replace(aside, path)
    return power


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say what was found."""
    with one_line_errors():
        power = measure(parse(AnalyticConfig, argv, description=__doc__))
        print("mean square of the noise estimate from t = 0 to T - 1:")
        print(" ".join(f"{value:.4f}" for value in power))


if __name__ == "__main__":
    main()
