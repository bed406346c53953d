"""CLIP through transformers: text encoder, tokenizer and image encoder of a diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging

from unclip.clip.frozen import FrozenCLIP, Text


class HuggingFaceCLIP(FrozenCLIP):
    """CLIPTextModelWithProjection, and CLIPVisionModelWithProjection where there is one.

    Embeddings are the projections as they come, not normalised: Karlo and Kandinsky were trained on
    those.
    """

    unit_norm = False

    def __init__(
        self,
        text_encoder: Any,
        tokenizer: Any,
        image_encoder: Any = None,
        image_processor: Any = None,
        name: str = "clip",
    ) -> None:
        mean = getattr(image_processor, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        std = getattr(image_processor, "image_std", None) or open_clip.OPENAI_DATASET_STD
        config = text_encoder.config
        super().__init__(
            name,
            embed_dim=config.projection_dim,
            text_width=config.hidden_size,
            context_length=min(config.max_position_embeddings, tokenizer.model_max_length),
            image_size=None if image_encoder is None else image_encoder.config.image_size,
            mean=mean,
            std=std,
        )
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.image_encoder = None
        if image_encoder is not None:
            self.image_encoder = image_encoder.eval().requires_grad_(False)
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def cut_text(self, caption: str) -> str:
        """The end of a caption that does not fit the text encoder ("" when all of it fits)."""
        room = self.context_length - 2  # start and end tokens
        if len(caption.encode()) <= room:  # a token covers at least one byte
            return ""
        tokens = self.tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        return str(self.tokenizer.decode(tokens[room:])).strip() if len(tokens) > room else ""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        """Encode B captions on the model's device; outputs are fp32."""
        self.check_captions(captions)
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.context_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # As their pipelines do, the encoder sees no mask: it is causal, and reads the end token.
        out = self.text_encoder(tokens.input_ids)
        mask = tokens.attention_mask.bool()
        return Text(out.text_embeds.float(), out.last_hidden_state.float(), mask)

    def _image_features(self, images: Tensor) -> Tensor:
        assert self.image_encoder is not None
        embeds: Tensor = self.image_encoder(images.to(self.image_encoder.dtype)).image_embeds
        return embeds

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write sub-folders of diffusers' names: text_encoder, tokenizer, image_encoder."""
        parts = {"text_encoder": self.text_encoder, "image_encoder": self.image_encoder}
        for name, model in parts.items():
            if model is not None:
                state = {
                    key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                    for key, tensor in model.state_dict().items()
                }
                model.save_pretrained(folder / name, state_dict=state)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / "feature_extractor")

    def _weights(self) -> dict[str, Any]:
        weights = {f"text.{k}": v for k, v in self.text_encoder.state_dict().items()}
        if self.image_encoder is not None:
            weights |= {f"image.{k}": v for k, v in self.image_encoder.state_dict().items()}
        return weights


def load_huggingface(folder: Path) -> HuggingFaceCLIP:
    """Load a folder with `text_encoder`, `tokenizer` and, maybe, `image_encoder`.

    Raises:
        FileNotFoundError: one of the first two is missing.
        ValueError: a part cannot be read.
    """
    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks {name}: copy or download the folder again")
    options: dict[str, Any] = {"local_files_only": True}
    weights = options | {"use_safetensors": True}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a small bar for each part says nothing
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", **options)
        text_encoder = CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder", **weights
        )
        image_encoder = image_processor = None
        if (folder / "image_encoder").is_dir():
            image_encoder = CLIPVisionModelWithProjection.from_pretrained(
                folder / "image_encoder", **weights
            )
        for name in ("feature_extractor", "image_processor"):  # Karlo's name and Kandinsky's
            if (folder / name).is_dir():
                image_processor = CLIPImageProcessor.from_pretrained(folder / name, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"the CLIP in {folder} cannot be loaded: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return HuggingFaceCLIP(text_encoder, tokenizer, image_encoder, image_processor, str(folder))
