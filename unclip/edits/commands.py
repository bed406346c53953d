"""The verbs as sub-commands of `sample.py`: their flags, what they read, what they draw.

Shapes: N embeddings, D width of CLIP's joint space, H W a picture's own size.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.diffusion import Resampling
from unclip.edits.blending import check_theta, interpolate, text_diff
from unclip.edits.drawing import check_eta, decode, inpaint, upscale, upscaled_side, variations
from unclip.edits.fitting import check_embeds, check_mask, fit
from unclip.edits.latents import Latent, invert, psnr, reconstruct
from unclip.edits.principal import default_components, fit_pca, pca_reconstructions
from unclip.pictures import AnimationFormat, read_mask, read_picture
from unclip.pipeline import CascadeOutput, UnCLIP

INPUTS_OF: dict[str, tuple[str, ...]] = {
    "variations": ("image",),
    "invert": ("image",),
    "interpolate": ("a", "b"),
    "text-diff": ("image",),
    "pca": ("image",),
    "inpaint": ("image",),
    "upscale": ("image",),
    "decode": ("embedding",),
}
"""Sub-command -> what it is given."""
INPUTS = {
    "image": "a picture of any format and size",
    "a": "a picture's file, or a caption",
    "b": "a picture's file, or a caption",
    "embedding": ".npy of image embeddings [D] or [N, D], or the file that `invert` wrote",
}
NUM_IMAGES = {"variations": 4, "interpolate": 9, "text-diff": 6}
"""Pictures drawn unless told otherwise, where that is not 1."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a sub-command drew."""

    output: CascadeOutput
    """The pictures."""
    labels: list[str]
    """What to write over each."""
    animation: AnimationFormat | None = None
    """For pictures that lead from one to the next."""
    noted: dict[str, Any] = field(default_factory=dict)
    """What the PNGs say besides."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Ending of a name -> what else to write."""


# ----------------------------------------------------------------------------------------- reading


def add_arguments(verb: str, group: Any) -> None:
    """Put a sub-command's own arguments into a group of a parser."""

    def number(flag: str, default: int, text: str, **more: Any) -> None:
        text = f"{text} (default: {default})"
        group.add_argument(flag, type=int, default=default, metavar="N", help=text, **more)

    for name in INPUTS_OF[verb]:
        group.add_argument(name, metavar=name.upper(), help=INPUTS[name])
    if verb == "text-diff":
        text = {"required": True, "metavar": "TEXT"}
        group.add_argument("--from", dest="source", help="what IMAGE shows now", **text)
        group.add_argument("--to", dest="target", help="what it is to show", **text)
        said = "how far to go, above 0; the paper takes 0.25 to 0.50 (default: 0.5)"
        group.add_argument("--theta", type=float, default=0.5, metavar="X", help=said)
    if verb == "interpolate":
        said = "where the pictures lie, 0 (A) to 1 (B): one number mixes A and B by weight"
        group.add_argument("--at", type=float, nargs="+", metavar="X", help=said)
        said = "start all from the seed's noise, not from the inversions of the ends"
        group.add_argument("--fixed-noise", action="store_true", help=said)
    if verb == "invert":
        number("--num-iterations", 1, "network evaluations a step: more find x_T more exactly")
    if verb == "pca":
        said = "numbers of components (default: powers of two, and all)"
        group.add_argument("--num-components", type=int, nargs="+", metavar="K", help=said)
        said = "fit on this: `shapes`, pictures, or a folder of embeddings (default: the model's)"
        group.add_argument("--data", metavar="SOURCE", help=said)
        number("--num-samples", 10_000, "pictures of --data to fit on, at the most")
    if verb == "inpaint":
        said = "a picture as large as IMAGE: white is painted anew, black is kept"
        group.add_argument("--mask", required=True, metavar="FILE", help=said)
        number("--jump-length", Resampling.jump_length, "steps of one jump back")
        number("--num-resamples", Resampling.num_resamples, "times each stretch is drawn")
    if verb in ("interpolate", "text-diff"):
        said = "the animated file's (default: gif)"
        choices = get_args(AnimationFormat)
        group.add_argument("--animation", choices=choices, default="gif", help=said)
    group.add_argument("--prompt", metavar="TEXT", help="a caption for the decoder (default: none)")
    if verb != "invert":  # what is drawn from a latent by DDIM is one picture
        flags = ["--num-images", *(["--frames"] if verb in ("interpolate", "text-diff") else [])]
        default = NUM_IMAGES.get(verb, 1)
        each = " of each number of components, a seed each" if verb == "pca" else ""
        said = f"pictures{each} (default: {default})"
        group.add_argument(*flags, type=int, default=default, metavar="N", help=said)
    number("--seed", 0, "of the first picture")


def read_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments name: pictures [3, H, W], masks [H, W], embeddings, texts.

    Raises:
        ValueError: a file cannot be read, or a flag is out of its range.
    """
    inputs = {name: _read(name, getattr(args, name)) for name in INPUTS_OF[args.verb]}
    if args.verb == "inpaint":
        Resampling(jump_length=args.jump_length, num_resamples=args.num_resamples)
        inputs["mask"] = read_mask(Path(args.mask))
        check_mask(inputs["mask"], inputs["image"])
    if args.verb == "variations":
        check_eta(1.0 if args.eta is None else args.eta)
    if args.verb == "text-diff":
        check_theta(args.theta)
    if args.verb in ("interpolate", "text-diff") and args.num_images < 2:
        raise ValueError(
            f"--frames must be at least 2, both ends; got {args.num_images}: use "
            f"{NUM_IMAGES[args.verb]}"
        )
    return inputs


def _read(kind: str, value: str) -> Any:
    path = Path(value)
    if kind == "embedding":
        return read_embedding(path)
    if kind == "image" or path.is_file():
        return read_picture(path)
    if path.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"{value} cannot be read: there is no such file")
    return value


def read_embedding(path: Path) -> Tensor | Latent:
    """An `.npy` of embeddings as they are, or the latent that `invert` wrote; raises ValueError
    where it is neither."""
    if path.suffix == ".safetensors":
        return Latent.load(path)
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as an .npy of numbers: {error}") from error


def inputs_noted(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What a PNG says of what it was made from: texts, and names of files with their checksums."""
    names = [*INPUTS_OF[args.verb], *(["mask"] if args.verb == "inpaint" else [])]
    noted = {}
    for name in names:
        path = Path(value := getattr(args, name))
        noted[name] = {"text": value}
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            noted[name] = {"file": path.name, "sha256": digest}
    return noted


# ----------------------------------------------------------------------------------------- drawing


def draw(
    model: UnCLIP, args: argparse.Namespace, inputs: Mapping[str, Any], options: dict[str, Any]
) -> Drawn:
    """Run a sub-command: what `read_inputs` read, drawn with the fields of `CascadeOptions` that
    were given. Says on stdout how pictures are brought to the model's size."""
    side = _side(model, args, inputs, options)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name in ("image", "a", "b"):
            _note_size(getattr(args, name), value, side)
    return _DRAW[args.verb](model, args, inputs, {"seed": args.seed, **options})


def _side(
    model: UnCLIP, args: argparse.Namespace, inputs: Mapping[str, Any], options: dict[str, Any]
) -> int:
    """The side that a sub-command brings pictures to, px."""
    if args.verb == "inpaint":
        return int(options.get("size") or model.sizes[-1])
    if args.verb == "upscale":
        return upscaled_side(model, inputs["image"])
    return model.decoder.image_size


def _note_size(name: str, image: Tensor, side: int) -> None:
    height, width = image.shape[-2:]
    if (height, width) != (side, side):
        cut = "" if height == width else "its middle square is "
        print(f"note: {name} is {width} x {height} px: {cut}resized to {side} px")


def _variations(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    options = {"eta": 1.0, **options}
    output = variations(
        model, inputs["image"], num_images=args.num_images, prompt=args.prompt, **options
    )
    labels = [f"seed {seed}, eta {options['eta']:g}" for seed in output.seeds]
    return Drawn(output=output, labels=labels)


def _invert(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    options = {"decoder_steps": 50, **options, "prompt": args.prompt}
    latent = invert(model, inputs["image"], num_iterations=args.num_iterations, **options)
    output = reconstruct(model, latent, **options)
    side = model.decoder.image_size
    error = psnr(output.by_size[side], fit(inputs["image"], side)[None]).item()
    print(f"drawn again in {output.options.decoder_steps} steps: {error:.2f} dB at {side} px")
    return Drawn(
        output=output,
        labels=[f"PSNR {error:.2f} dB"],
        noted={"psnr": error, "num_iterations": args.num_iterations},
        files={"latent.safetensors": latent.to_bytes()},
    )


def _interpolate(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    if args.a == args.b:
        print("note: A and B are the same: so is all between them")
    output = interpolate(
        model,
        inputs["a"],
        inputs["b"],
        at=args.at or args.num_images,
        fixed_x_T=args.fixed_noise,
        prompt=args.prompt,
        **options,
    )
    at = args.at or torch.linspace(0, 1, args.num_images).tolist()
    animation = args.animation if len(at) > 1 else None
    return Drawn(output=output, labels=[f"{f:.2f}" for f in at], animation=animation)


def _text_diff(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    output = text_diff(
        model,
        inputs["image"],
        args.source,
        args.target,
        theta=args.theta,
        frames=args.num_images,
        prompt=args.prompt,
        **options,
    )
    thetas = torch.linspace(0, args.theta, args.num_images).tolist()
    labels = [f"theta {theta:.2f}" for theta in thetas]
    return Drawn(output=output, labels=labels, animation=args.animation)


def _pca(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    pca = model.pca
    if args.data is not None:
        pca = fit_pca(model, args.data, args.num_samples)
    if pca is None:
        raise ValueError(
            "this model has no PCA with it; got no --data: name pictures or a folder of embeddings "
            "to fit one on"
        )
    counts = args.num_components or default_components(len(pca.mean))
    output = pca_reconstructions(
        model,
        inputs["image"],
        pca,
        num_components=counts,
        num_images=args.num_images,
        prompt=args.prompt,
        **options,
    )
    labels = [f"{count} components" for count in counts] * args.num_images
    if args.num_images > 1:
        pairs = zip(labels, output.seeds, strict=True)
        labels = [f"{label}, seed {seed}" for label, seed in pairs]
    return Drawn(output=output, labels=labels)


def _inpaint(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    output = inpaint(
        model,
        inputs["image"],
        inputs["mask"],
        prompt=args.prompt,
        num_images=args.num_images,
        resampling=Resampling(jump_length=args.jump_length, num_resamples=args.num_resamples),
        **options,
    )
    return Drawn(output=output, labels=[f"seed {seed}" for seed in output.seeds])


def _upscale(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    output = upscale(
        model, inputs["image"], prompt=args.prompt, num_images=args.num_images, **options
    )
    return Drawn(output=output, labels=[f"seed {seed}" for seed in output.seeds])


def _decode(model: UnCLIP, args: Any, inputs: Any, options: dict[str, Any]) -> Drawn:
    given = inputs["embedding"]
    if isinstance(given, Latent):
        output = reconstruct(model, given, prompt=args.prompt, **options)
        return Drawn(output=output, labels=["from its latent"])
    if model.clip is not None:
        _, far = check_embeds(given, model.clip.embed_dim, model.clip.unit_norm)
        if far:
            print(f"note: {far} embeddings are brought to unit norm, as the model's own have it")
    output = decode(model, given, prompt=args.prompt, num_images=args.num_images, **options)
    seeds = enumerate(output.seeds)
    labels = [f"row {k // args.num_images}, seed {seed}" for k, seed in seeds]
    return Drawn(output=output, labels=labels)


_DRAW: dict[str, Callable[[UnCLIP, Any, Any, dict[str, Any]], Drawn]] = {
    "variations": _variations,
    "invert": _invert,
    "interpolate": _interpolate,
    "text-diff": _text_diff,
    "pca": _pca,
    "inpaint": _inpaint,
    "upscale": _upscale,
    "decode": _decode,
}
