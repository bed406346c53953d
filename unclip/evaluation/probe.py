"""What a CLIP's image_embed holds of a scene: linear probes on the shapes world.

`python -m unclip.evaluation.probe CLIP` trains one linear classifier for each attribute of each of
two objects on embeddings of training scenes, and tests it on held-out ones. Retrieval alone does
not tell: a CLIP can find the right caption among 256 and still lose which colour went where.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP, load_clip
from unclip.data.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SceneObject,
    ShapesConfig,
    ShapesDataset,
)


def labels(objects: Sequence[SceneObject]) -> dict[str, int]:
    """What the probes are to read of a scene: shape, colour and cell of each object."""
    found = {}
    for number, thing in enumerate(objects, start=1):
        column, row = thing.cell
        found[f"shape_{number}"] = SHAPES.index(thing.shape)
        found[f"colour_{number}"] = list(COLOURS).index(thing.colour)
        found[f"cell_{number}"] = row * 3 + column
    return found


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, weight_decay: float = 1e-4
) -> Tensor:
    """Fit a linear softmax classifier to the training set: where is it right on the test set?

    Args:
        train_x, test_x: features [S, D]. train_y, test_y: labels [S].
        weight_decay: L2 penalty.

    Returns:
        [T] bool.
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
        return layer(test_x).argmax(1) == test_y


def probe_clip(clip: FrozenCLIP, num_train: int = 6000, num_test: int = 1000) -> dict[str, Any]:
    """Probe accuracies for scenes of one and of two objects, and retrieval among 256 captions.

    Pairs are also scored by relation: `inside` is the hard one, a small object on a large one."""
    results: dict[str, Any] = {}
    for count in (1, 2):
        weights = (1.0, 0.0, 0.0) if count == 1 else (0.0, 1.0, 0.0)
        train = ShapesDataset(ShapesConfig(seed=11, object_weights=weights))
        test = ShapesDataset(ShapesConfig(seed=11, object_weights=weights, split="held_out"))
        train_x = clip.encode_rows(train, range(num_train)).cpu()
        test_x = clip.encode_rows(test, range(num_test)).cpu()
        train_labels = [labels(train.scene(row)[0].objects) for row in range(num_train)]
        test_scenes = [test.scene(row)[0] for row in range(num_test)]
        test_labels = [labels(scene.objects) for scene in test_scenes]
        results[f"objects_{count}"] = table = {}
        for name in test_labels[0]:
            train_y, test_y = (
                torch.tensor([label[name] for label in some])
                for some in (train_labels, test_labels)
            )
            hits = linear_probe(train_x, train_y, test_x, test_y).float()
            table[name] = {"all": hits.mean().item()}
            for relation in RELATIONS if count == 2 else ():
                of_relation = torch.tensor([scene.relation == relation for scene in test_scenes])
                table[name][relation] = hits[of_relation].mean().item()
    dataset = ShapesDataset(ShapesConfig(seed=11, split="held_out", caption_detail="full"))
    images = clip.encode_rows(dataset, range(256))
    text = clip.encode_text([dataset.scene(row)[1].text for row in range(256)])
    ranked = (images @ text.text_embed.T).argmax(1).cpu()
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
