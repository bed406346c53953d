"""Train a prior of any kind: what `train_prior.py` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.embeddings import EmbeddingDataset, is_embedding_folder, made_by
from unclip.data.source import SourceConfig, open_source, sources_of
from unclip.hub import Stages, check_stages, write_run_model
from unclip.lora import LoRAConfig
from unclip.priors import (
    AutoregressivePrior,
    AutoregressivePriorConfig,
    DiffusionPrior,
    DiffusionPriorConfig,
    FlowPrior,
    FlowPriorConfig,
    LinearPrior,
    LinearPriorConfig,
    OneStepPrior,
    OneStepPriorConfig,
    Prior,
)
from unclip.training.batches import first_rows
from unclip.training.checkpoints import alone, open_run
from unclip.training.finetune import (
    base_of,
    choose_trained,
    clip_for_training,
    stage_of,
    start_from,
    warn_of_differences,
)
from unclip.training.fit import FitConfig, fit
from unclip.training.prior_objectives import OBJECTIVES
from unclip.training.validation import held_out_data


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
    val_data: str | None = None
    """Held-out pictures or embeddings, read as `source` says; None is the shapes world's held-out
    split where that is trained on, else none."""
    prior: DiffusionPriorConfig | None = None
    """A diffusion prior's network and diffusion, which is what is trained unless one of the next
    four is set. The widths of embeddings and encodings are taken from the CLIP."""
    autoregressive: AutoregressivePriorConfig | None = None
    """A prior that draws principal components as tokens (paper, section 2.2)."""
    one_step: OneStepPriorConfig | None = None
    """A prior without steps (ECLIPSE)."""
    flow: FlowPriorConfig | None = None
    """A flow matching prior."""
    linear: LinearPriorConfig | None = None
    """Ridge regression: solved at once, `fit` has no part in it."""
    statistics_samples: int = 4096
    """How many samples the embeddings' mean and std (and principal components) are measured on
    before the first step, where the prior starts at random."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The loop."""

    def __post_init__(self) -> None:
        if len(given := [name for name in SECTIONS if getattr(self, name) is not None]) > 1:
            raise ValueError(
                f"one of {', '.join(SECTIONS)} must be set at the most; got {' and '.join(given)}: "
                "train one kind of prior at a time"
            )
        for name in ("init", "lora", "freeze", "train_only"):
            if self.linear is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be left out with linear, which is solved and not trained; got "
                    f"{getattr(self, name)}"
                )

    @property
    def section(self) -> str:
        """Which kind is to be trained, by the name of its field."""
        return next((name for name in SECTIONS if getattr(self, name) is not None), "prior")


SECTIONS: dict[str, type[Prior]] = {
    "prior": DiffusionPrior,
    "autoregressive": AutoregressivePrior,
    "one_step": OneStepPrior,
    "flow": FlowPrior,
    "linear": LinearPrior,
}
"""Field of `TrainPriorConfig` -> kind of prior."""


def resolve(config: TrainPriorConfig, clip: FrozenCLIP) -> TrainPriorConfig:
    """The config with its kind's own section, and in it the widths of the CLIP."""
    section = config.section
    own = getattr(config, section) or SECTIONS[section].config_class()
    widths = {
        "embed_dim": clip.embed_dim,
        "text_encodings_dim": clip.text_width,
        "max_text_len": clip.context_length,
    }
    known = {field.name for field in fields(own.network)}
    network = replace(own.network, **{k: v for k, v in widths.items() if k in known})
    return replace(config, **{section: replace(own, network=network)})


def spread_rows(dataset: Dataset[Any], count: int) -> list[int]:
    """`count` rows spread evenly over a data set: its files may come sorted by subject. Of one that
    is read shard after shard, the first that training will read."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(count, total)
    if any(
        getattr(part, "shards", None) is not None for part in getattr(dataset, "parts", [dataset])
    ):
        return first_rows(dataset, count)
    stride = 1 if getattr(dataset, "endless", False) else total // count
    return [row * stride for row in range(count)]


def true_pairs(
    clip: FrozenCLIP, dataset: Dataset[Any], config: TrainPriorConfig
) -> tuple[Tensor, Tensor]:
    """image_embed and text_embed [S, D] of captioned pictures, which a prior begins from."""
    linear = config.linear
    rows = spread_rows(dataset, linear.num_samples if linear else config.statistics_samples)
    fetch = getattr(dataset, "__getitems__", lambda rows: [dataset[row] for row in rows])
    images, texts = [], []
    for start in range(0, len(rows), 64):  # a data set's pictures do not fit into memory together
        samples = fetch(rows[start : start + 64])
        images.append(clip.encode_samples(samples))
        texts.append(clip.encode_text([sample["caption"] for sample in samples]).text_embed)
    return torch.cat(images), torch.cat(texts)


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
    if theirs is not None and not made_by(theirs, clip):
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
    from_rows = all(map(is_embedding_folder, config.source.names))
    clip = clip_for_training(config.clip, base, config.init, needs_images=not from_rows)
    config = replace(resolve(config, clip), base=base)
    dataset = open_source(config.source)
    for read in sources_of(dataset):
        if isinstance(read, EmbeddingDataset):
            check_embeddings(read, clip, config.clip)
    torch.manual_seed(config.fit.seed)
    own = getattr(config, config.section)
    prior: Any  # of a kind that `init` or the config decides
    if config.init is not None:
        prior = start_from(stage_of(config.init, "prior"), own)
        check_stages(Stages(clip=clip, prior=prior), config.init)
    else:
        prior = SECTIONS[config.section].begin(own, *true_pairs(clip, dataset, config))
    section = next((name for name, kind in SECTIONS.items() if type(prior) is kind), "prior")
    resolved = {**to_dict(config), config.section: None, section: to_dict(prior.config)}

    def prepare_run(run: Path, stage: str = prior.stage) -> None:
        adapts = None if config.lora is None else prior.stage
        write_run_model(run, stage, base, config.clip, clip.fingerprint(), adapts)
        if config.init is not None:
            warn_of_differences(own, prior.config, config.section, config.init)

    if isinstance(prior, LinearPrior):  # `begin` has solved it
        if PartialState().is_main_process:
            with alone(config.run):
                open_run(config.run, resolved, config.fresh)
                prepare_run(config.run)
                prior.save(config.run / prior.stage)
        return
    choose_trained(
        prior.network,
        freeze=config.freeze,
        train_only=config.train_only,
        lora=config.lora,
        init=config.init,
    )
    objective = OBJECTIVES[type(prior)](prior, clip)
    if config.lora is not None:
        objective.stage = "lora"
    fit(
        objective,
        dataset,
        config.fit,
        config.run,
        resolved=resolved,
        fresh=config.fresh,
        prepare_run=lambda run: prepare_run(run, objective.stage),
        validation=held_out_data(config.source, config.val_data),
    )
