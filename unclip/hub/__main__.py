"""Put stages of several runs into one model: `python -m unclip.hub assemble --out DIR ...`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unclip.hub.folders import load_clip_of, load_stages, read_model, save_stages
from unclip.hub.model import Stages

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def assemble(
    out: Path,
    clip: str,
    prior: str,
    decoder: str,
    upsamplers: Sequence[str],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model from one CLIP, one prior, one decoder and upsamplers in the order of size.

    Each is a run's folder, a model or a stage's own folder; bases are not followed for upsamplers.
    """
    stages = Stages(
        clip=load_clip_of(clip),
        prior=load_stages(prior, only={"prior"}).prior,
        decoder=load_stages(decoder, only={"decoder"}).decoder,
        upsamplers=[read() for name in upsamplers for read in read_model(name).upsamplers],
    )
    save_stages(stages, out, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m unclip.hub", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("assemble", help="make one model")
    command.add_argument("--out", required=True, type=Path, help="folder to write")
    command.add_argument("--clip", required=True, help="CLIP: a run, a folder, an open_clip name")
    command.add_argument("--prior", required=True, help="run, model or stage folder")
    command.add_argument("--decoder", required=True, help="run, model or stage folder")
    command.add_argument("--upsampler", action="append", default=[], help="the same; repeatable")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of stored weights")
    args = parser.parse_args(argv)
    try:
        assemble(args.out, args.clip, args.prior, args.decoder, args.upsampler, DTYPES[args.dtype])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = [path for path in args.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{args.out}: {len(files)} files, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
