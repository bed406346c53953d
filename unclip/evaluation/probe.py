"""What a CLIP's image_embed holds of a scene: linear probes on the shapes world.

`python -m unclip.evaluation.probe CLIP` trains one linear classifier for each attribute of each of
two objects on embeddings of training scenes, and tests it on held-out ones. Retrieval alone does
not tell: a CLIP can find the right caption among 256 and still lose which colour went where.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP, load_clip
from unclip.data.shapes import COLOURS, SHAPES, ShapesConfig, ShapesDataset


def _embedded(
    clip: FrozenCLIP, config: ShapesConfig, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings [count, D] and, for each probe, labels [count]."""
    dataset = ShapesDataset(config)
    embeds: list[Tensor] = []
    labels: dict[str, list[int]] = {}
    for start in range(0, count, 100):
        rows = list(range(start, min(start + 100, count)))
        images = torch.stack([sample["image"] for sample in dataset.__getitems__(rows)])  # type: ignore[misc]
        embeds.append(clip.encode_image(images.to(clip.device)).cpu())
        for row in rows:
            scene, _ = dataset.scene(row)
            for number, thing in enumerate(scene.objects):
                attributes = {
                    "shape": SHAPES.index(thing.shape),
                    "colour": list(COLOURS).index(thing.colour),
                    "cell": thing.cell[0] * 3 + thing.cell[1],
                }
                for name, label in attributes.items():
                    labels.setdefault(f"{name}_{number + 1}", []).append(label)
    return torch.cat(embeds), {name: torch.tensor(values) for name, values in labels.items()}


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, weight_decay: float = 1e-4
) -> float:
    """Accuracy on the test set of a linear softmax classifier fitted to the training set.

    Args:
        train_x, test_x: features [S, D]. train_y, test_y: labels [S].
        weight_decay: L2 penalty.
    """
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    classes = int(max(train_y.max(), test_y.max())) + 1
    layer = torch.nn.Linear(train_x.shape[1], classes)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weight_decay * layer.weight.square().sum()
        loss = F.cross_entropy(layer(train_x), train_y) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return (layer(test_x).argmax(1) == test_y).float().mean().item()


def probe_clip(clip: FrozenCLIP, num_train: int = 6000, num_test: int = 1000) -> dict[str, Any]:
    """Probe accuracies for scenes of one and of two objects, and retrieval among 256 captions."""
    results: dict[str, Any] = {}
    for count in (1, 2):
        weights = (1.0, 0.0, 0.0) if count == 1 else (0.0, 1.0, 0.0)
        train = _embedded(clip, ShapesConfig(seed=11, object_weights=weights), num_train)
        test = _embedded(
            clip, ShapesConfig(seed=11, object_weights=weights, split="held_out"), num_test
        )
        results[f"objects_{count}"] = {
            name: linear_probe(train[0], labels, test[0], test[1][name])
            for name, labels in train[1].items()
        }
    dataset = ShapesDataset(ShapesConfig(seed=11, split="held_out", caption_detail="full"))
    samples = dataset.__getitems__(range(256))
    images = torch.stack([sample["image"] for sample in samples]).to(clip.device)  # type: ignore[misc]
    text = clip.encode_text([str(sample["caption"]) for sample in samples])
    ranked = (clip.encode_image(images) @ text.text_embed.T).argmax(1).cpu()
    results["retrieval_at_1_of_256"] = (ranked == torch.arange(256)).float().mean().item()
    return results


def main() -> None:
    """Print the probes of one CLIP as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", help="a CLIP folder, hf-hub:org/name, or an open_clip model/tag")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(json.dumps(probe_clip(load_clip(arguments.clip, arguments.device)), indent=2))


if __name__ == "__main__":
    main()
