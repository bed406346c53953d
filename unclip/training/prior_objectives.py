"""What each kind of prior is trained on: one objective a kind.

Shapes: B captioned pictures, D width of CLIP's joint space.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP, Text
from unclip.diffusion import NoiseSchedule, diffusion_loss, flow_loss, flow_path, flow_times
from unclip.diffusion.flow import TIME_SCALE
from unclip.models import Context
from unclip.priors import (
    AutoregressivePrior,
    DiffusionPrior,
    FlowPrior,
    MultiQueryDiffusionPrior,
    OneStepPrior,
    Prior,
    TransformerPrior,
)
from unclip.training.finetune import save_trained
from unclip.training.fit import Objective, draw
from unclip.training.noise import normal, uniform


class PriorObjective(Objective):
    """A prior's loss: z_i given the caption, which is dropped at times for guidance."""

    stage = "prior"
    network: TransformerPrior
    frozen: tuple[FrozenCLIP]

    def __init__(self, prior: TransformerPrior, clip: FrozenCLIP) -> None:
        super().__init__()
        self.network = prior
        self.frozen = (clip,)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of B captioned pictures, or of B captions with the `image_embed` [B, D] of theirs;
        `cosine` is that of the predicted to the true z_i."""
        (clip,), network = self.frozen, self.network.config.network
        if "image_embed" in batch:
            image_embed = batch["image_embed"].float()
        else:
            image_embed = clip.encode_image(batch["image"])
        text = clip.encode_text(batch["caption"]).trimmed()
        chances = uniform(generator, len(image_embed), device=image_embed.device)
        dropped = chances < network.text_drop_prob
        empty = clip.null_text(network.null_text)
        context = self.network.encode_context(text, dropped, empty)
        return self.losses(image_embed, text, dropped, context, generator)

    @abstractmethod
    def losses(
        self,
        image_embed: Tensor,
        text: Text,
        dropped: Tensor,
        context: Context,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """What `forward` returns, for z_i [B, D] under the captions' context.

        Args:
            image_embed: true embeddings.
            text: the captions.
            dropped: [B] bool, the rows whose context is without the caption.
            context: the network's.
            generator: of all that is drawn.
        """

    def cosine(self, x_0: Tensor, image_embed: Tensor) -> Tensor:
        """Mean cosine of predictions, as the network makes them, to true embeddings."""
        predicted = self.network.denormalize(x_0.detach().float())
        return torch.cosine_similarity(predicted, image_embed).mean()

    def export(self, folder: Path) -> None:
        """Write the prior's folder, or its adapter's."""
        save_trained(self.network, folder)


class DiffusionPriorObjective(PriorObjective):
    """Denoise z_i, MSE on z_i (paper, section 2.2)."""

    network: DiffusionPrior

    def __init__(self, prior: DiffusionPrior, clip: FrozenCLIP) -> None:
        super().__init__(prior, clip)
        self.schedule = NoiseSchedule(prior.config.diffusion)

    def losses(
        self,
        image_embed: Tensor,
        text: Text,
        dropped: Tensor,
        context: Context,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The loss in the space of the config's prediction."""
        x_0 = self.network.normalize(image_embed)
        timesteps, noise = draw(x_0, self.schedule, generator)
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        output = self.network.network(x_t, timesteps, context)
        losses = diffusion_loss(self.schedule, output, x_0, noise, timesteps)
        predicted = self.schedule.predict_x_0(x_t, output.float(), timesteps)
        return {
            "loss": losses["loss"].mean(),
            "x_0_mse": losses["x_0_mse"].mean(),
            "cosine": self.cosine(predicted, image_embed),
            "per_sample": losses["loss"].detach(),
            "timesteps": timesteps / self.schedule.config.num_train_timesteps,
        }


class FlowPriorObjective(PriorObjective):
    """The velocity from z_i to noise, MSE (Lipman et al. 2023)."""

    network: FlowPrior

    def losses(
        self,
        image_embed: Tensor,
        text: Text,
        dropped: Tensor,
        context: Context,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The velocity's error."""
        x_0 = self.network.normalize(image_embed)
        u = uniform(generator, len(x_0), device=x_0.device)
        noise = normal(generator, *x_0.shape, device=x_0.device)
        config = self.network.config.flow
        t = flow_times(config, u)
        x_t, _ = flow_path(x_0, noise, t)
        output = self.network.network(x_t, TIME_SCALE * t, context).float()
        per_sample, predicted = flow_loss(config, output, x_0, noise, t)
        return {
            "loss": per_sample.mean(),
            "cosine": self.cosine(predicted, image_embed),
            "per_sample": per_sample.detach(),
            "timesteps": t,
        }


class OneStepPriorObjective(PriorObjective):
    """Predict z_i from noise at once: MSE, and a contrastive loss that ties it to its caption
    (ECLIPSE, Patel et al. 2024, equations 5 to 7)."""

    network: OneStepPrior

    def losses(
        self,
        image_embed: Tensor,
        text: Text,
        dropped: Tensor,
        context: Context,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Both losses; rows without a caption have no part in the second."""
        config = self.network.config
        x_0 = self.network.normalize(image_embed)
        noise = normal(generator, *x_0.shape, device=x_0.device)
        timesteps = torch.zeros(len(x_0), dtype=torch.long, device=x_0.device)
        predicted = self.network.network(noise, timesteps, context).float()
        mse = (predicted - x_0).square().mean()
        ours = F.normalize(self.network.denormalize(predicted), dim=-1)
        theirs = F.normalize(text.text_embed, dim=-1)
        logits = ours @ theirs.T / config.contrastive_temperature
        right = torch.arange(len(logits), device=logits.device)
        per_row = F.cross_entropy(logits, right, reduction="none")
        contrastive = per_row.masked_fill(dropped, 0).sum() / (~dropped).sum().clamp(min=1)
        return {
            "loss": mse + config.contrastive_weight * contrastive,
            "x_0_mse": mse.detach(),
            "contrastive": contrastive.detach(),
            "cosine": self.cosine(predicted, image_embed),
        }


class AutoregressivePriorObjective(PriorObjective):
    """Predict the tokens of z_i one after the other: cross-entropy (paper, section 2.2)."""

    network: AutoregressivePrior

    def losses(
        self,
        image_embed: Tensor,
        text: Text,
        dropped: Tensor,
        context: Context,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy, nats a token; without a caption the dot product is not told either."""
        prior = self.network
        tokens = prior.quantize(image_embed)
        dot = prior.quantize_dot(image_embed, text.text_embed)
        dot = dot.masked_fill(dropped, prior.network.no_dot)
        logits = prior.network(dot, tokens, context).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return {"loss": loss}


OBJECTIVES: dict[type[Prior], type[PriorObjective]] = {
    DiffusionPrior: DiffusionPriorObjective,
    MultiQueryDiffusionPrior: DiffusionPriorObjective,
    FlowPrior: FlowPriorObjective,
    OneStepPrior: OneStepPriorObjective,
    AutoregressivePrior: AutoregressivePriorObjective,
}
"""The linear prior has none: it is solved, not trained."""
