"""Train a small CLIP by the symmetric contrastive loss: `python -m unclip.training.clip`.

For use where nothing can be downloaded; the classes and the loss are open_clip's. It learns from
any captioned pictures. The built-in world's scenes come in runs of near-copies (`shapes.variants`),
so that a batch holds hard negatives and the towers have to bind each colour to its shape and place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from unclip.checkpoint import save_weights, written_whole
from unclip.clip import BPE_NAME, load_openclip, new_clip, write_clip_config, write_vocabulary
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.shapes import ShapesConfig
from unclip.data.source import SourceConfig, check_pictures, open_source
from unclip.training.fit import FitConfig, Objective, fit
from unclip.training.validation import held_out_data


@dataclass(frozen=True, kw_only=True)
class SmallCLIPConfig:
    """Sizes of a small CLIP: a ModifiedResNet for pictures, a causal transformer for text."""

    embed_dim: int = 256
    """Width of the joint space."""
    image_size: int = 64
    """Side of the pictures, px; a multiple of 32."""
    image_width: int = 24
    """Width of the image tower's first stage."""
    image_layers: tuple[int, int, int, int] = (2, 2, 2, 1)
    """Bottleneck blocks in the image tower's four stages."""
    text_width: int = 192
    """Width of the text transformer."""
    text_layers: int = 3
    """Blocks of the text transformer."""
    text_heads: int = 4
    """Attention heads of the text transformer."""
    context_length: int = 32
    """Tokens a caption may have, start and end included."""
    num_merges: int = 8192
    """How many of CLIP's byte-pair merges to keep."""
    logit_scale: float = 30.0
    """Factor on the cosines at the start; open_clip's 14.3 spends long on what is easy to tell."""

    def __post_init__(self) -> None:
        if self.image_size % 32:
            raise ValueError(
                f"clip.image_size must be a multiple of 32; got {self.image_size}: use 64"
            )

    def model_cfg(self) -> dict[str, Any]:
        """The same in open_clip's terms."""
        return {
            "embed_dim": self.embed_dim,
            "init_logit_scale": math.log(self.logit_scale),
            "vision_cfg": {
                "image_size": self.image_size,
                "layers": list(self.image_layers),
                "width": self.image_width,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "width": self.text_width,
                "heads": self.text_heads,
                "layers": self.text_layers,
            },
        }


@dataclass(frozen=True, kw_only=True)
class TrainCLIPConfig:
    """Everything `python -m unclip.training.clip` needs."""

    run: Path = Path("runs/clip")
    """Folder of this run; the CLIP lands in its sub-folder `clip`."""
    fresh: bool = False
    """Start over, discarding what the run's folder holds."""
    init: Path | None = None
    """Folder of a CLIP of the same sizes to start from; None starts at random."""
    clip: SmallCLIPConfig = field(default_factory=SmallCLIPConfig)
    """Sizes."""
    source: SourceConfig = field(
        default_factory=lambda: SourceConfig(shapes=ShapesConfig(variants=4, seed=1))
    )
    """What to train on."""
    val_data: str | None = None
    """Held-out pictures, a source as `source.data` names one; None is the shapes world's held-out
    split where that is trained on, else nothing."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The loop."""

    def __post_init__(self) -> None:
        side = self.source.crop_size or self.source.image_size
        if side != self.clip.image_size:
            raise ValueError(
                f"source must give pictures of clip.image_size, {self.clip.image_size} px; got "
                f"{side}: set source.image_size to {self.clip.image_size}, or source.crop_size, "
                "which cuts that out of larger ones at random"
            )
        check_pictures(self.source, "to train a CLIP on")


class CLIPObjective(Objective):
    """The symmetric contrastive loss of open_clip over all processes' pictures and captions."""

    stage = "clip"
    network: open_clip.CLIP
    mean: Tensor
    std: Tensor

    def __init__(self, config: SmallCLIPConfig, vocabulary: Path) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.network, self.tokenizer = new_clip(config.model_cfg(), vocabulary)
        self.register_buffer("mean", (2 * torch.tensor(open_clip.OPENAI_DATASET_MEAN) - 1))
        self.register_buffer("std", 2 * torch.tensor(open_clip.OPENAI_DATASET_STD))

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Contrastive loss of [B] pictures and captions; `accuracy` is top-1, picture to text."""
        del generator  # nothing here is random
        images = (batch["image"] - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)
        tokens = self.tokenizer(batch["caption"]).to(images.device)
        image_embed, text_embed, scale = self.network(images, tokens)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        loss = open_clip.ClipLoss(
            local_loss=True,
            gather_with_grad=True,
            rank=torch.distributed.get_rank() if distributed else 0,
            world_size=torch.distributed.get_world_size() if distributed else 1,
        )(image_embed.float(), text_embed.float(), scale)
        hit = (image_embed @ text_embed.T).argmax(1) == torch.arange(len(images)).to(images.device)
        return {"loss": loss, "accuracy": hit.float().mean(), "logit_scale": scale.detach()}

    def export(self, folder: Path) -> None:
        """Write the folder in open_clip's layout, which `load_clip` and open_clip read."""
        with written_whole(folder) as temporary:
            write_clip_config(temporary, self.config.model_cfg(), self.tokenizer.vocab_size)
            (temporary / BPE_NAME).write_bytes(self.vocabulary.read_bytes())
            save_weights(self.network.state_dict(), temporary / "open_clip_model.safetensors")


def start_from(network: nn.Module, other: nn.Module, init: str | Path, sizes: str) -> None:
    """Take the weights of `other`, found under the name `init`.

    Args:
        network: what is to be trained.
        other: a network of the same class and sizes.
        init: the setting that named it, for the error.
        sizes: the setting that holds the network's sizes, for the error.

    Raises:
        ValueError: the two differ in their sizes.
    """
    try:
        network.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"init must have a {type(network).__name__} of the sizes in {sizes}; got {init}, which "
            f"differs ({str(error).splitlines()[1].strip()}): set {sizes}.* to what its config says"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    config = parse(TrainCLIPConfig, argv, description=__doc__)
    with one_line_errors():
        train(config)


def train(config: TrainCLIPConfig) -> None:
    """Train what `config` describes, into its run's folder."""
    with TemporaryDirectory() as folder:
        vocabulary = Path(folder) / BPE_NAME
        write_vocabulary(vocabulary, config.clip.num_merges)
        torch.manual_seed(config.fit.seed)
        objective = CLIPObjective(config.clip, vocabulary)
        if config.init is not None:
            other = load_openclip(str(config.init))
            start_from(objective.network, other.model, config.init, "clip")
        fit(
            objective,
            open_source(config.source),
            config.fit,
            config.run,
            resolved=to_dict(config),
            fresh=config.fresh,
            validation=held_out_data(config.source, config.val_data),
        )


if __name__ == "__main__":
    main()
