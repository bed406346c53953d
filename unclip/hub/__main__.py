"""Models from stages, and models in other formats.

`python -m unclip.hub assemble --out DIR ...` puts the stages of several runs into one model;
`python -m unclip.hub export --to diffusers --out DIR MODEL` writes a model in another format, and
`--to unclip` one that stands on no other, with adapters merged;
`python -m unclip.hub publish MODEL org/name` puts one on the Hugging Face Hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from unclip.hub import diffusers_format
from unclip.hub.folders import load_clip_of, load_stages, read_model, save_stages
from unclip.hub.model import STAGES, Stages
from unclip.hub.publish import publish, write_repository
from unclip.priors import PCA
from unclip.stages import PictureStage

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def assemble(
    out: Path,
    clip: str,
    prior: str,
    decoder: str,
    upsamplers: Sequence[str],
    dtype: torch.dtype | None = torch.float16,
) -> None:
    """Write a model from one CLIP, one prior, one decoder and upsamplers in the order of size.

    Each is a run's folder, a model or a stage's own folder; bases are not followed for upsamplers,
    but where the folder holds an adapter of theirs.
    """
    stages = Stages(
        clip=load_clip_of(clip),
        pca=pca_of(clip),
        prior=load_stages(prior, only={"prior"}).prior,
        decoder=load_stages(decoder, only={"decoder"}).decoder,
        upsamplers=[upsampler for name in upsamplers for upsampler in own_upsamplers(name)],
    )
    save_stages(stages, out, dtype)


def pca_of(name: str) -> PCA | None:
    """The PCA that lies beside a model's CLIP, if `name` is a model that has one."""
    try:
        read = read_model(name).pca
    except FileNotFoundError:  # a CLIP, by open_clip's name
        return None
    return None if read is None else read()


def own_upsamplers(name: str) -> list[PictureStage]:
    """The upsamplers that a model has itself, or has adapters of."""
    model = read_model(name)
    if not any(stage.startswith("upsampler") for stage in model.adapters):
        return [read() for read in model.upsamplers]
    upsamplers = load_stages(name, only={"upsamplers"}).upsamplers
    return [up for up in upsamplers if f"upsampler_{up.image_size}" in model.adapters]


def export(
    model: str,
    out: Path,
    to: str,
    parts: Collection[str] = STAGES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model, of whatever format, as `unclip`'s own or in `diffusers`' layout, its base's
    stages with it and adapters merged."""
    stages = load_stages(model, only=parts, optional={"clip", "prior", "decoder"})
    if to == "diffusers":
        diffusers_format.write(stages, out, dtype)
    else:
        save_stages(stages, out, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m unclip.hub", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("assemble", help="make one model of several runs' stages")
    command.add_argument("--out", required=True, type=Path, help="folder to write")
    command.add_argument("--clip", required=True, help="CLIP: a run, a folder, an open_clip name")
    command.add_argument("--prior", required=True, help="run, model or stage folder")
    command.add_argument("--decoder", required=True, help="run, model or stage folder")
    command.add_argument("--upsampler", action="append", default=[], help="the same; repeatable")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of stored weights")
    command = commands.add_parser("export", help="write a model in another format")
    command.add_argument("model", help="shipped name, folder, or org/name on the Hub")
    command.add_argument("--to", required=True, choices=("diffusers", "unclip"), help="format")
    command.add_argument("--out", required=True, type=Path, help="folder to write")
    command.add_argument("--parts", default=",".join(STAGES), help="stages, between commas")
    command.add_argument("--dtype", choices=DTYPES, help="of stored weights; their own if left out")
    command = commands.add_parser("publish", help="put a model on the Hugging Face Hub")
    command.add_argument("model", help="shipped name, folder, or org/name on the Hub")
    command.add_argument("repo_id", metavar="org/name", help="the repository, made if not there")
    command.add_argument("--license", default="apache-2.0", help="the Hub's name of one")
    command.add_argument("--data", action="append", default=[], help="trained on; repeatable")
    command.add_argument("--grid", type=Path, help="picture of samples for the card")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--dry-run", type=Path, metavar="DIR", help="only write the folder there")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of stored weights")
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype] if args.dtype else None
    try:
        if args.command == "assemble":
            assemble(args.out, args.clip, args.prior, args.decoder, args.upsampler, dtype)
        elif args.command == "export":
            export(args.model, args.out, args.to, args.parts.split(","), dtype)
        else:
            stages = load_stages(args.model, optional={"prior", "decoder"})
            options = {"license": args.license, "data": args.data, "grid": args.grid}
            if args.dry_run is None:
                url = publish(stages, args.repo_id, **options, dtype=dtype, private=args.private)
                print(url)
                return 0
            write_repository(stages, args.dry_run, args.repo_id, **options, dtype=dtype)
            args.out = args.dry_run
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = [path for path in args.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{args.out}: {len(files)} files, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
