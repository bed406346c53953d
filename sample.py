"""Draw pictures from captions: `python sample.py --guidance 3.0 --prompt "a red circle"`; or do
something to a picture that is there: `python sample.py variations cat.png`.

Writes one PNG a picture and a captioned grid, and prints where they are and what each stage took.
Every PNG carries all that made it: `--from-png FILE` draws the same picture again.
"""

from __future__ import annotations

import argparse
import difflib
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from unclip.pictures import (
    NOT_OURS,
    animated,
    check_writable,
    encoded,
    grid,
    next_number,
    read_metadata,
    save,
    slug,
    strip,
    to_pil,
    write_new,
)

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


def interval(text: str) -> tuple[float, float]:
    """Two numbers with a comma between."""
    low, high = map(float, text.split(","))
    return low, high


# Flag -> field of CascadeOptions, whose defaults the help repeats (a test compares them): reading
# them from there would make `--help` wait for torch.
OPTIONS: list[tuple[list[str], str, Callable[[str], Any], str]] = [
    (["--guidance"], "guidance_scale", float, "decoder's guidance, 1 is off (default: 3.0)"),
    (["--embed"], "embed", str, "for the image embedding: prior, text, none (default: prior)"),
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
    (
        ["--guidance-interval"],
        "guidance_interval",
        interval,
        "guide from LOW to HIGH noise alone",
    ),
    (
        ["--guidance-rescale"],
        "guidance_rescale",
        float,
        "guide with less contrast (default: 0.0)",
    ),
    (["--dynamic-threshold"], "dynamic_threshold", float, "share within range, say 0.995"),
    (["--negative-prompt"], "negative_prompt", str, "a caption that guidance leads away from"),
    (["--best-of"], "best_of", int, "pictures drawn for each one kept, by CLIP (default: 1)"),
    (["--size"], "size", int, "side to stop at, px (default: the model's largest)"),
]
VERBS = {
    "variations": "pictures of which CLIP sees the same as of IMAGE",
    "invert": "find the noise behind IMAGE, and draw it again from that",
    "interpolate": "pictures from A to B, each a picture or a caption",
    "text-diff": "take IMAGE from what one text says to what another does",
    "pca": "draw IMAGE from more and more principal components of its embedding",
    "inpaint": "paint the white parts of --mask anew in IMAGE, keep the black ones",
    "upscale": "make IMAGE larger by the upsamplers alone",
    "decode": "draw image embeddings from elsewhere",
}
EXTENSIONS = {"gif": "animation.gif", "webp": "animation.webp", "apng": "animation.png"}
MODEL_FLAGS = ("model", "prior", "decoder", "upsampler", "device", "dtype")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what was not given is None."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and not words[0].startswith("-"):
        return parse_verb(words)
    verbs = "\n".join(f"  {name:12} {text}" for name, text in VERBS.items())
    parser = OneLineParser(
        description=__doc__,
        epilog=f"what can be done to a picture (sample.py WORD --help says how):\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; repeatable")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="a caption a line")
    what.add_argument("--num-images", type=int, metavar="N", help="for each prompt (default: 1)")
    what.add_argument("--seed", type=int, metavar="N", help="of the first picture (default: 0)")
    what.add_argument("--from-png", type=Path, metavar="FILE", help="draw this picture again")
    add_options(parser)
    args = parser.parse_args(words)
    args.verb = None
    if args.prompt and args.prompts_file:
        parser.error("--prompt and --prompts-file exclude each other")
    drawing = ["prompt", "prompts_file", "num_images", "seed", *(o[1] for o in OPTIONS)]
    if args.from_png and (given := [d for d in drawing if getattr(args, d) is not None]):
        flag = next((o[0][0] for o in OPTIONS if o[1] == given[0]), "--" + given[0])
        parser.error(f"--from-png repeats a picture as it was: leave out {flag.replace('_', '-')}")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to draw, with what, and where to: the same for every command."""
    how = parser.add_argument_group("how to draw it (other models may have other defaults)")
    for flags, dest, kind, text in OPTIONS:
        metavar = {int: "N", float: "X", str: "NAME", interval: "LOW,HIGH"}[kind]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where the input is at fault."""
    args = parse_args(argv)
    try:
        check_writable(args.out)  # before minutes of drawing, not after
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            if args.verb is not None:
                edit(args)
            else:
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
    settings, options = settings_of(args), options_of(args)
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
    write_new(grid_path, encoded(grid(pictures, captions, columns)))
    report([*paths, grid_path], output.seconds, len(pictures))


def repeat(args: argparse.Namespace) -> None:
    """The picture of `--from-png` once more."""
    made_by = settings_written(args.from_png)
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Which model to load, and how."""
    return {flag: getattr(args, flag) or DEFAULTS.get(flag) for flag in MODEL_FLAGS}


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of CascadeOptions that were given."""
    options = {name: getattr(args, name) for _, name, _, _ in OPTIONS}
    return {name: value for name, value in options.items() if value is not None}


def settings_written(path: Path) -> dict[str, Any]:
    """What made a picture of captions; raises ValueError for any other."""
    values = read_metadata(path)
    if "verb" in values:
        command = shlex.join(map(str, values.get("command", [])))
        raise ValueError(
            f"--from-png {path}: a picture of `{values['verb']}` is drawn again by its own "
            f"command, from the same input: python sample.py {command}"
        )
    if not {"prompt", "batch", "index", "options", "model", "dtype"} <= values.keys():
        raise ValueError(NOT_OURS.format(path=path))
    names = {name for _, name, _, _ in OPTIONS}
    if values["dtype"] not in DTYPES or not values["options"].keys() <= names:
        raise ValueError(f"--from-png {path}: its metadata has settings that sample.py never wrote")
    return values


# ------------------------------------------------------------------------- what is done to pictures


def parse_verb(words: list[str]) -> argparse.Namespace:
    """The command line of a sub-command."""
    name = words[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else "captions go behind --prompt"
        OneLineParser().error(f"no such command {name!r} among {', '.join(VERBS)}: {hint}")
    from unclip.edits import commands

    parser = OneLineParser(prog=f"sample.py {name}", description=VERBS[name], allow_abbrev=False)
    commands.add_arguments(name, parser.add_argument_group("what to draw"))
    add_options(parser)
    args = parser.parse_args(words[1:])
    args.verb, args.words, args.from_png = name, words, None
    return args


def edit(args: argparse.Namespace) -> None:
    """What a sub-command draws, and its files: PNGs, and a grid, or a strip and an animation."""
    from unclip.edits import commands

    settings, options = settings_of(args), options_of(args)
    check([] if args.prompt is None else [args.prompt], options)
    inputs = commands.read_inputs(args)  # before the model is loaded, not after
    unclip, settings["device"] = load(settings, args.offload)
    drawn = commands.draw(unclip, args, inputs, options)
    output, number = drawn.output, next_number(args.out)
    pictures = [to_pil(image) for image in output.images]
    first = getattr(args, commands.INPUTS_OF[args.verb][0])
    name = f"{args.verb}-{slug(Path(first).stem)}"
    made_by = {
        "verb": args.verb,
        "command": args.words,
        "inputs": commands.inputs_noted(args),
        **settings,
        "options": asdict(output.options),
        **drawn.noted,
    }
    paths = []
    for k, (picture, label) in enumerate(zip(pictures, drawn.labels, strict=True)):
        own = {"prompt": output.prompts[k] or label, "seed": output.seeds[k], "index": k}
        path = args.out / f"{number + k:04d}-{name}.png"
        paths.append(save(picture, {**made_by, "label": label, **own}, path))
    files = dict(drawn.files)
    if drawn.animation is not None:
        files["strip.png"] = encoded(strip(pictures))
        files[EXTENSIONS[drawn.animation]] = animated(pictures, drawn.animation)
    elif len(pictures) > 1:
        files["grid.png"] = encoded(grid(pictures, drawn.labels, min(len(pictures), 8)))
    paths += [
        write_new(args.out / f"{number:04d}-{name}-{ending}", content)
        for ending, content in files.items()
    ]
    report(paths, output.seconds, len(pictures))


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


def report(paths: Sequence[Path], seconds: dict[str, float], count: int) -> None:
    """Print where the files are and what each stage took."""
    for path in paths:
        print(path)
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
    print(f"{count} pictures in {sum(seconds.values()):.1f} s: {stages}")


if __name__ == "__main__":
    sys.exit(main())
