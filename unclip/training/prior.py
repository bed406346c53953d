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
from unclip.data.embeddings import EmbeddingDataset
from unclip.data.source import SourceConfig, open_source, sources_of
from unclip.diffusion import NoiseSchedule, diffusion_loss
from unclip.hub import Stages, check_stages, write_run_model
from unclip.lora import LoRAConfig
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.training.finetune import (
    base_of,
    choose_trained,
    clip_for_training,
    save_trained,
    stage_of,
    start_from,
    warn_of_differences,
)
from unclip.training.fit import FitConfig, Objective, draw, fit


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig:
    """Everything `train_prior.py` needs."""

    run: Path = Path("runs/prior")
    """Folder of this run; the prior lands in its sub-folder `prior`."""
    fresh: bool = False
    """Start over, discarding what the run's folder holds."""
    base: str | None = None
    """Model whose CLIP the prior stands on and whose stages complete it for sampling; None is
    `init`, or `shapes` where the run starts at random."""
    clip: str | None = None
    """Another CLIP: a folder, `hf-hub:org/name`, or an open_clip model/tag."""
    init: str | None = None
    """Model whose prior to start from: a name, a folder, or `org/name` on the Hub; None starts at
    random. Network and diffusion are its own, whatever `prior` says, and so are the embeddings'
    mean and std, in whose units it was trained; `prior`'s drop probabilities, attention backend
    and loss weights hold."""
    freeze: tuple[str, ...] | None = None
    """Parts of the network that stay as they are: parameters or modules, `*` for any letters."""
    train_only: tuple[str, ...] | None = None
    """Parts of the network to train, in the same way; the rest stays as it is."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter of the init's prior instead; it lands in the sub-folder `lora`."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Captioned pictures, or a folder of embeddings that `unclip.embed` or clip-retrieval wrote."""
    prior: DiffusionPriorConfig = field(default_factory=DiffusionPriorConfig)
    """Network and diffusion; the widths of embeddings and encodings are taken from the CLIP."""
    statistics_samples: int = 4096
    """How many samples the embeddings' mean and std are measured on before the first step, where
    the prior starts at random."""
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
        """Loss of B captioned pictures, or of B captions with the `image_embed` [B, D] of theirs;
        `cosine` is that of the predicted to the true z_i."""
        (clip,), prior = self.frozen, self.network
        if "image_embed" in batch:
            image_embed = batch["image_embed"].float()
        else:
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
        """Write the prior's folder, or its adapter's."""
        save_trained(self.network, folder)


def spread_rows(dataset: Dataset[Any], count: int) -> list[int]:
    """`count` rows spread evenly over a data set: its files may come sorted by subject."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(count, total)
    stride = 1 if getattr(dataset, "endless", False) else total // count
    return [row * stride for row in range(count)]


def check_embeddings(dataset: EmbeddingDataset, clip: FrozenCLIP, named: str | None) -> None:
    """Raise ValueError unless a folder's embeddings are of this CLIP.

    Args:
        dataset: the folder.
        clip: what the prior stands on.
        named: the config's `clip`.
    """
    folder, manifest = dataset.folder, dataset.manifest
    if manifest is None and named is None:
        raise ValueError(
            f"clip must be named for embeddings without a manifest; got {folder}, which does not "
            "say what made it: pass the CLIP that did, such as --clip ViT-L-14/openai"
        )
    theirs = None if manifest is None else manifest["clip"]
    if theirs is not None and theirs["fingerprint"] != clip.fingerprint():
        raise ValueError(
            f"clip must be the one that made the embeddings in {folder}, {theirs['name']} "
            f"({theirs['fingerprint']}); got {clip.name} ({clip.fingerprint()}): pass --clip "
            f"{theirs['name']}, or embed the pictures again with --clip {clip.name}"
        )
    if dataset.embed_dim != clip.embed_dim:
        raise ValueError(
            f"clip must be as wide as the embeddings in {folder}, {dataset.embed_dim}; got "
            f"{clip.name}, {clip.embed_dim}: pass the CLIP that made them"
        )
    # Without a manifest nothing else tells Karlo's CLIP from OpenAI's: their weights are the same.
    rows = spread_rows(dataset, 64)
    norms = clip.encode_rows(dataset, rows).norm(dim=1)
    unit_norm = bool(((norms - 1).abs() < 0.01).all())
    if unit_norm != clip.unit_norm:
        raise ValueError(
            f"clip must give {'normalised' if unit_norm else 'unnormalised'} embeddings, as those "
            f"in {folder} are, of norms {norms.min():.2f} to {norms.max():.2f}; got {clip.name}, "
            "whose are not: pass the CLIP of a model of the same family"
        )


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """Parse the command line and train."""
    config = parse(TrainPriorConfig, argv, default_config=default_config, description=__doc__)
    with one_line_errors():
        train(config)


def train(config: TrainPriorConfig) -> None:
    """Train what `config` describes, into its run's folder."""
    base = base_of(config.base, config.init, config.run, config.lora)
    clip = clip_for_training(config.clip, base, config.init)
    config = replace(resolve(config, clip), base=base)
    dataset = open_source(config.source)
    for read in sources_of(dataset):
        if isinstance(read, EmbeddingDataset):
            check_embeddings(read, clip, config.clip)
    torch.manual_seed(config.fit.seed)
    if config.init is not None:
        prior = start_from(stage_of(config.init, "prior"), config.prior)
        check_stages(Stages(clip=clip, prior=prior), config.init)
    else:
        prior = DiffusionPrior(config.prior)
        rows = spread_rows(dataset, config.statistics_samples)
        prior.fit_statistics(clip.encode_rows(dataset, rows))
    choose_trained(
        prior.network,
        freeze=config.freeze,
        train_only=config.train_only,
        lora=config.lora,
        init=config.init,
    )
    objective = PriorObjective(prior, clip)
    if config.lora is not None:
        objective.stage = "lora"

    def prepare_run(run: Path) -> None:
        adapts = None if config.lora is None else "prior"
        write_run_model(run, objective.stage, base, config.clip, clip.fingerprint(), adapts)
        if config.init is not None:
            warn_of_differences(config.prior, prior.config, "prior", config.init)

    fit(
        objective,
        dataset,
        config.fit,
        config.run,
        resolved={**to_dict(config), "prior": to_dict(prior.config)},
        fresh=config.fresh,
        prepare_run=prepare_run,
    )
