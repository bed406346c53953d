"""Train a diffusion prior: what `train_prior.py` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.source import SourceConfig, open_source
from unclip.diffusion import NoiseSchedule, diffusion_loss
from unclip.hub import load_clip_of, load_stages, write_run_model
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.training.checkpoints import start_from
from unclip.training.fit import FitConfig, Objective, draw, fit


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig:
    """Everything `train_prior.py` needs."""

    run: Path = Path("runs/prior")
    """Folder of this run; the prior lands in its sub-folder `prior`."""
    fresh: bool = False
    """Start over, discarding what the run's folder holds."""
    base: str = "shapes"
    """Model whose CLIP the prior stands on and whose stages complete it for sampling."""
    clip: str | None = None
    """Another CLIP: a folder, `hf-hub:org/name`, or an open_clip model/tag."""
    init: str | None = None
    """Model whose prior, of the same sizes, to start from: a name, a folder, or `org/name` on the
    Hub; None starts at random. The embeddings' mean and std are measured anew."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Captioned pictures."""
    prior: DiffusionPriorConfig = field(default_factory=DiffusionPriorConfig)
    """Network and diffusion; the widths of embeddings and encodings are taken from the CLIP."""
    statistics_samples: int = 4096
    """How many pictures the embeddings' mean and std are measured on before the first step."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The loop."""


def resolve(config: TrainPriorConfig, clip: FrozenCLIP) -> TrainPriorConfig:
    """The config with the widths of its CLIP filled in."""
    network = replace(
        config.prior.network,
        embed_dim=clip.embed_dim,
        text_encodings_dim=clip.text_width,
        max_text_len=clip.context_length,
    )
    return replace(config, prior=replace(config.prior, network=network))


class PriorObjective(Objective):
    """The prior's loss (paper, section 2.2): denoise z_i given the caption, MSE on z_i."""

    stage = "prior"
    network: DiffusionPrior
    frozen: tuple[FrozenCLIP]

    def __init__(self, prior: DiffusionPrior, clip: FrozenCLIP) -> None:
        super().__init__()
        self.network = prior
        self.schedule = NoiseSchedule(prior.config.diffusion)
        self.frozen = (clip,)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of B captioned pictures; `cosine` is that of the predicted to the true z_i."""
        (clip,), prior = self.frozen, self.network
        image_embed = clip.encode_image(batch["image"])
        text = clip.encode_text(batch["caption"]).trimmed()
        x_0 = prior.normalize(image_embed)
        timesteps, noise = draw(x_0, self.schedule, generator)
        drop_text = torch.rand(len(x_0), generator=generator, device=x_0.device)
        dropped = drop_text < prior.config.network.text_drop_prob
        empty = clip.null_text(prior.config.network.null_text)
        context = prior.encode_context(text, dropped, empty)
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        output = prior.network(x_t, timesteps, context)
        losses = diffusion_loss(self.schedule, output, x_0, noise, timesteps)
        predicted = prior.denormalize(self.schedule.predict_x_0(x_t, output.float(), timesteps))
        return {
            "loss": losses["loss"].mean(),
            "x_0_mse": losses["x_0_mse"].mean(),
            "cosine": torch.cosine_similarity(predicted.detach(), image_embed).mean(),
            "per_sample": losses["loss"].detach(),
            "timesteps": timesteps / self.schedule.config.num_train_timesteps,
        }

    def export(self, folder: Path) -> None:
        """Write the prior's folder."""
        self.network.save(folder)


def spread_rows(dataset: Dataset[Any], count: int) -> list[int]:
    """`count` rows spread evenly over a data set: its files may come sorted by subject."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(count, total)
    stride = 1 if getattr(dataset, "endless", False) else total // count
    return [row * stride for row in range(count)]


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """Parse the command line and train."""
    config = parse(TrainPriorConfig, argv, default_config=default_config, description=__doc__)
    with one_line_errors():
        train(config)


def train(config: TrainPriorConfig) -> None:
    """Train what `config` describes, into its run's folder."""
    clip = load_clip_of(config.clip or config.base)
    config = resolve(config, clip)
    dataset = open_source(config.source)
    torch.manual_seed(config.fit.seed)
    prior = DiffusionPrior(config.prior)
    if config.init is not None:
        other = load_stages(config.init, only=["prior"]).prior
        assert other is not None
        start_from(prior.network, other.network, config.init, "prior.network")
    rows = spread_rows(dataset, config.statistics_samples)
    prior.fit_statistics(clip.encode_rows(dataset, rows))
    fit(
        PriorObjective(prior, clip),
        dataset,
        config.fit,
        config.run,
        resolved=to_dict(config),
        fresh=config.fresh,
        prepare_run=lambda run: write_run_model(
            run, "prior", config.base, config.clip, clip.fingerprint()
        ),
    )
