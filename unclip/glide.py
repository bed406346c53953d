"""GLIDE's stages (Nichol et al. 2021): a caption straight to 64 px, and from there to 256 px.

They stand in the decoder's and the upsampler's place of the cascade. Each has a text transformer of
its own, so there is no CLIP and no prior before them.

Shapes: B pictures, N caption tokens, S side of the pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from unclip.checkpoint import save_stage
from unclip.config import to_dict
from unclip.diffusion import DiffusionConfig
from unclip.models import Glide, GlideConfig
from unclip.stages import Conditions, Known, PictureStage, SamplingOptions, required_low_res

TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt")
END_TOKEN = "<|endoftext|>"  # what GLIDE pads with


def _diffusion() -> DiffusionConfig:
    return DiffusionConfig(
        prediction_type="eps", variance="learned_range", timestep_spacing="linspace"
    )


@dataclass(frozen=True, kw_only=True)
class GlideStageConfig:
    """GLIDE's network and its diffusion."""

    network: GlideConfig = field(default_factory=GlideConfig)
    """The U-Net and its text transformer."""
    diffusion: DiffusionConfig = field(default_factory=_diffusion)
    """Schedule, target and loss."""
    tokenizer: str = "openai-community/gpt2"
    """GPT-2's byte-pair encoding: a repository on the Hub, or a folder with `vocab.json` and
    `merges.txt`."""


class GlideStage(PictureStage):
    """P(x | y), or P(x | small x, y): pictures from captions alone, small ones made larger with
    the caption's help, or parts of a picture painted anew."""

    stage = "glide"
    config_class = GlideStageConfig
    network_class = Glide
    config: GlideStageConfig
    network: Glide

    @property
    def is_upsampler(self) -> bool:
        """Whether it enlarges what another stage drew."""
        return self.config.network.scale is not None

    @cached_property
    def tokenizer(self) -> ByteLevelBPETokenizer:
        """GPT-2's; raises FileNotFoundError where its files are not there and cannot be had."""
        return ByteLevelBPETokenizer(*map(str, self._tokenizer_files()))

    def _tokenizer_files(self) -> list[Path]:
        name = self.config.tokenizer
        try:
            if Path(name).is_dir():
                return [Path(name, file).resolve(strict=True) for file in TOKENIZER_FILES]
            return [Path(hf_hub_download(name, file)) for file in TOKENIZER_FILES]
        except (OSError, HFValidationError) as error:  # no folder, no network, no repository
            raise FileNotFoundError(
                f"GLIDE's captions need GPT-2's {' and '.join(TOKENIZER_FILES)}, which cannot be "
                f"had from {name!r} ({' '.join(str(error).split())[:200]}): put the two files "
                "beside GLIDE's"
            ) from error

    def tokenize(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Ids [B, N] and mask [B, N] (True = a token) of B captions in lower case, cut to N; None
        is no caption: padding alone."""
        length = self.config.network.text.context_length
        tokens = torch.full((len(captions), length), self.tokenizer.token_to_id(END_TOKEN))
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            ids = self.tokenizer.encode(caption.lower()).ids[:length] if caption else []
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[row, : len(ids)] = True
        device = next(self.parameters()).device
        return tokens.to(device), mask.to(device)

    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Pictures [B, 3, S, S] from `captions`, `negative_caption`, `image` and `repaint`, and for
        an upsampler `low_res`; see `PictureStage.sample`."""
        if conditions.captions is None:
            raise ValueError("captions must be given to GLIDE's networks; got None: pass texts")
        shown: dict[str, Tensor] = {}
        known, size = Known.of(conditions, self.image_size), self.image_size
        if known is not None and self.is_shown_known:
            shown |= known._asdict()
        if self.is_upsampler:
            low_res = required_low_res(conditions)
            # What its own sampler passes on went through a file's 8 bits.
            shown["low_res"] = ((low_res + 1) * 127.5).round() / 127.5 - 1
            size = low_res.shape[-1] * (self.config.network.scale or 1)
        tokens, token_mask = self.tokenize(conditions.captions)
        context = self.network.encode_context(tokens=tokens, token_mask=token_mask, **shown)
        null = None
        if options.guidance_scale != 1 and conditions.negative_caption is not None:
            away = self.tokenize([conditions.negative_caption] * len(tokens))
            null = self.network.encode_context(tokens=away[0], token_mask=away[1], **shown)
        elif options.guidance_scale != 1:
            null = self.network.null_context(tokens=tokens, token_mask=token_mask, **shown)
        return self._denoise(size, context, null, generators, options, x_T, known=known)

    @property
    def is_shown_known(self) -> bool:
        """Whether the network has channels for a picture that is known in part."""
        return self.config.network.inpainting

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage's folder, with its tokenizer if that came from a folder."""
        config, more = self.config, None
        if Path(config.tokenizer).is_dir():
            config = replace(config, tokenizer=TOKENIZER_FOLDER)
            more = self._save_tokenizer
        values = {"stage": self.stage, **to_dict(config)}
        save_stage(folder, values, self.state_dict(), dtype, more)

    def _save_tokenizer(self, folder: Path) -> None:
        (folder / TOKENIZER_FOLDER).mkdir()
        for file in self._tokenizer_files():
            shutil.copy(file, folder / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> GlideStage:
        """Read a stage's folder, its weights in `dtype`; raises FileNotFoundError or ValueError
        with what is wrong."""
        stage = super().load(folder, dtype)
        if (tokenizer := Path(folder) / TOKENIZER_FOLDER).is_dir():
            stage.config = replace(stage.config, tokenizer=str(tokenizer))
        return stage
