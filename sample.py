"""Draw pictures from captions: `python sample.py --guidance 3.0 --prompt "a red circle"`.

Writes one PNG a picture and a captioned grid, and prints where they are and what each stage took.
Every PNG carries all that made it: `--from-png FILE` draws the same picture again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

if TYPE_CHECKING:
    from unclip import UnCLIP

DEFAULT_PROMPTS = [
    "a red circle left of a blue square",
    "a yellow star in the top right corner",
    "a big green triangle in the middle",
    "a purple heart above an orange cross",
]
DEFAULTS = {"model": "shapes", "dtype": "float32"}
DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZE = 8
METADATA_KEY, FORMAT, VERSION = "unclip", "unclip-picture", 1

# Flag -> field of CascadeOptions, whose defaults the help repeats (a test compares them): reading
# them from there would make `--help` wait for torch.
OPTIONS: list[tuple[list[str], str, type, str]] = [
    (["--guidance"], "guidance_scale", float, "decoder's guidance, 1 is off (default: 3.0)"),
    (["--prior-guidance"], "prior_guidance_scale", float, "the prior's (default: 1.0)"),
    (["--num-candidates"], "num_candidates", int, "embeddings to choose from (default: 2)"),
    (["--prior-steps"], "prior_steps", int, "the prior's steps (default: 32)"),
    (["--steps", "--decoder-steps"], "decoder_steps", int, "the decoder's steps (default: 30)"),
    (["--upsampler-steps"], "upsampler_steps", int, "an upsampler's steps (default: 12)"),
    (["--sampler"], "sampler", str, "the decoder's: ddpm, ddim, dpm++, ... (default: ddim)"),
    (["--prior-sampler"], "prior_sampler", str, "the prior's (default: its own)"),
    (["--prior-temperature"], "prior_temperature", float, "of a prior of tokens (default: 1.0)"),
    (["--prior-top-p"], "prior_top_p", float, "of a prior of tokens (default: 1.0)"),
    (["--upsampler-sampler"], "upsampler_sampler", str, "the upsamplers' (default: ddim)"),
    (["--eta"], "eta", float, "noise the decoder's ddim adds, 0 to 1 (default: 0.0)"),
    (["--negative-prompt"], "negative_prompt", str, "a caption that guidance leads away from"),
    (["--best-of"], "best_of", int, "pictures drawn for each one kept, by CLIP (default: 1)"),
    (["--size"], "size", int, "side to stop at, px (default: the model's largest)"),
]
MODEL_FLAGS = ("model", "prior", "decoder", "upsampler", "device", "dtype")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what was not given is None."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; repeatable")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="a caption a line")
    what.add_argument("--num-images", type=int, metavar="N", help="for each prompt (default: 1)")
    what.add_argument("--seed", type=int, metavar="N", help="of the first picture (default: 0)")
    what.add_argument("--from-png", type=Path, metavar="FILE", help="draw this picture again")
    how = parser.add_argument_group("how to draw it (other models may have other defaults)")
    for flags, dest, kind, text in OPTIONS:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        how.add_argument(*flags, dest=dest, type=kind, metavar=metavar, help=text)
    model = parser.add_argument_group("with what, and where to")
    model.add_argument("--model", help="shipped name, folder or org/name (default: shapes)")
    for stage in ("prior", "decoder", "upsampler"):
        model.add_argument(f"--{stage}", metavar="MODEL", help=f"take the {stage} of another one")
    model.add_argument("--device", help="default: cuda where there is one, then mps, then cpu")
    model.add_argument("--dtype", choices=DTYPES, help="default: float32")
    model.add_argument("--offload", action="store_true", help="idle stages wait on the CPU")
    model.add_argument(
        "--out", type=Path, default=Path("outputs"), help="folder (default: outputs)"
    )
    args = parser.parse_args(argv)
    if args.prompt and args.prompts_file:
        parser.error("--prompt and --prompts-file exclude each other")
    drawing = ["prompt", "prompts_file", "num_images", "seed", *(o[1] for o in OPTIONS)]
    if args.from_png and (given := [d for d in drawing if getattr(args, d) is not None]):
        flag = next((o[0][0] for o in OPTIONS if o[1] == given[0]), "--" + given[0])
        parser.error(f"--from-png repeats a picture as it was: leave out {flag.replace('_', '-')}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where the input is at fault."""
    args = parse_args(argv)
    try:
        check_writable(args.out)  # before minutes of drawing, not after
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            draw(args) if args.from_png is None else repeat(args)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def draw(args: argparse.Namespace) -> None:
    """Pictures of the prompts, and their grid."""
    prompts = args.prompt or DEFAULT_PROMPTS
    if args.prompts_file is not None:
        prompts = read_prompts(args.prompts_file)
    num_images = 1 if args.num_images is None else args.num_images
    settings = {flag: getattr(args, flag) or DEFAULTS.get(flag) for flag in MODEL_FLAGS}
    options = {name: getattr(args, name) for _, name, _, _ in OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}

    check(prompts, options)  # before the model is loaded, not after
    unclip, settings["device"] = load(settings, args.offload)
    output = unclip(
        prompts,
        num_images=num_images,
        seed=args.seed or 0,
        batch_size=BATCH_SIZE,
        **options,
    )
    pictures = [to_pil(image) for image in output.images]
    number = next_number(args.out)
    paths = []
    for k, picture in enumerate(pictures):
        batch = slice(first := k - k % BATCH_SIZE, first + BATCH_SIZE)
        made_by = {
            "prompt": output.prompts[k],
            "seed": output.seeds[k],
            **settings,
            "options": asdict(output.options),
            # Floating-point sums change in their last bits with the batch: exactly the same
            # picture needs the company it was drawn in.
            "batch": {"prompts": output.prompts[batch], "seeds": output.seeds[batch]},
            "index": k - first,
        }
        name = f"{number + k:04d}-{slug(output.prompts[k] or '')}.png"
        paths.append(save(picture, made_by, args.out / name))
    columns = num_images if num_images > 1 else math.ceil(math.sqrt(len(pictures)))
    captions = [str(prompt) for prompt in output.prompts]
    grid_path = args.out / f"{number:04d}-grid.png"
    with grid_path.open("xb") as file:
        grid(pictures, captions, columns).save(file, "png")
    report([*paths, grid_path], output.seconds, len(pictures))


def repeat(args: argparse.Namespace) -> None:
    """The picture of `--from-png` once more."""
    made_by = read_metadata(args.from_png)
    settings = {flag: getattr(args, flag) or made_by.get(flag) for flag in MODEL_FLAGS}
    batch, index = made_by["batch"], made_by["index"]
    unclip, settings["device"] = load(settings, args.offload)
    output = unclip(
        batch["prompts"], seed=batch["seeds"], batch_size=BATCH_SIZE, **made_by["options"]
    )
    picture = to_pil(output.images[index])
    name = f"{next_number(args.out):04d}-{slug(made_by['prompt'])}.png"
    path = save(picture, {**made_by, **settings}, args.out / name)
    report([path], output.seconds, len(batch["prompts"]))
    with Image.open(args.from_png) as original:
        same = original.convert("RGB").tobytes() == picture.tobytes()
    if same:
        print(f"identical to {args.from_png}")
    else:
        print(f"warning: not identical to {args.from_png}: another model, library or machine")


# ------------------------------------------------------------------------------------- the model


def load(settings: dict[str, Any], offload: bool) -> tuple[UnCLIP, str]:
    """The model that the settings name, and the device it is on."""
    start = time.perf_counter()
    import torch

    from unclip import UnCLIP

    device = settings["device"]
    if device is None:
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        device = "cuda" if cuda else "mps" if mps else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch finds no CUDA device; use --device cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r} is none of torch's: use cpu, cuda or mps") from error
    unclip = UnCLIP.from_pretrained(
        settings["model"],
        **{stage: settings[stage] for stage in ("prior", "decoder", "upsampler")},
        device=device,
        dtype=getattr(torch, settings["dtype"]),
        offload=offload,
    )
    print(f"{settings['model']} loaded on {device} in {time.perf_counter() - start:.1f} s")
    return unclip, device


def check(prompts: Sequence[str], options: dict[str, Any]) -> None:
    """Raise ValueError where a prompt or an option is one that the cascade refuses."""
    from unclip.pipeline import CascadeOptions, check_prompt

    CascadeOptions(**options)
    for prompt in prompts:
        check_prompt(prompt)


def to_pil(image: Any) -> Image.Image:
    """A tensor [3, H, W] in [-1, 1] as a picture."""
    from unclip.data.images import to_pil

    return to_pil(image)


# ----------------------------------------------------------------------------------------- files


def read_prompts(path: Path) -> list[str]:
    """The captions of a text file, a line each; empty lines are skipped."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {path} cannot be read: {error}") from error
    if prompts := [line for line in lines if line]:
        return prompts
    raise ValueError(f"--prompts-file {path} is empty: write a caption a line")


def check_writable(folder: Path) -> None:
    """Make the folder; raise OSError unless files can be written into it."""
    probe = folder / ".unclip-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write into --out {folder} ({error.strerror}): choose another folder"
        ) from error


def next_number(folder: Path) -> int:
    """One more than the highest number that a file in the folder begins with."""
    numbers = [re.match(r"(\d{4,})-", path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in numbers if match), default=-1) + 1


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"


def save(picture: Image.Image, made_by: dict[str, Any], path: Path) -> Path:
    """Write a PNG that says what made it; never over a file that is there."""
    import torch

    import unclip

    versions = {"unclip": unclip.__version__, "torch": torch.__version__}
    values = {"format": FORMAT, "version": VERSION, **made_by, "versions": versions}
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(values))
    info.add_itxt("Description", made_by["prompt"])
    with path.open("xb") as file:
        picture.save(file, "png", pnginfo=info)
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` wrote into a PNG; raises ValueError for any other picture."""
    try:
        with Image.open(path) as picture:
            values = json.loads(picture.info.get(METADATA_KEY, "null"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--from-png {path} cannot be read: {error}") from error
    known = ("format", FORMAT), ("version", VERSION)
    needed = {"prompt", "batch", "index", "options", "model", "dtype"}
    is_ours = isinstance(values, dict) and all(values.get(k) == v for k, v in known)
    if not is_ours or not needed <= values.keys():
        raise ValueError(
            f"--from-png {path} must be a picture that sample.py wrote, with its metadata; got "
            "one without: editors and web sites strip it, take the original file"
        )
    names = {name for _, name, _, _ in OPTIONS}
    if values["dtype"] not in DTYPES or not values["options"].keys() <= names:
        raise ValueError(f"--from-png {path}: its metadata has settings that sample.py never wrote")
    return values


def report(paths: Sequence[Path], seconds: dict[str, float], count: int) -> None:
    """Print where the files are and what each stage took."""
    for path in paths:
        print(path)
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
    print(f"{count} pictures in {sum(seconds.values()):.1f} s: {stages}")


# ------------------------------------------------------------------------------------------ grid


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """The pictures row by row, each with its caption, wrapped, above it."""
    gap, line_height = 12, 18
    font = ImageFont.load_default(size=14)
    width, height = max(pictures[0].width, 128), pictures[0].height
    texts = [wrap(caption, font, width) for caption in captions]
    head = line_height * max(map(len, texts)) + 4
    rows = math.ceil(len(pictures) / columns)
    size = columns * (width + gap) + gap, rows * (head + height + gap) + gap
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for k, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left = gap + k % columns * (width + gap)
        top = gap + k // columns * (head + height + gap)
        for n, line in enumerate(lines):
            # Captions stand on their picture, whatever the number of their lines.
            y = top + head - 4 - line_height * (len(lines) - n)
            pen.text((left, y), line, fill="black", font=font)
        canvas.paste(picture, (left, top + head))
    return canvas


def wrap(text: str, font: Any, width: int) -> list[str]:
    """A text in lines of at most `width` px, four of them at the most."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " ..."]


if __name__ == "__main__":
    sys.exit(main())
