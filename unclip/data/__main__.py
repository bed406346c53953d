"""Look at captioned pictures before training: `python -m unclip.data check SOURCE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from unclip.config import one_line_errors
from unclip.data import build, check

COMMANDS = [check, build]


def load_clip(name: str) -> Any:
    """A CLIP by any name that the training scripts take."""
    # The rooms that read models take seconds to import, and most checks need none.
    from unclip.hub import load_clip_of

    return load_clip_of(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m unclip.data", description=__doc__)
    parser.set_defaults(load_clip=load_clip)
    commands = parser.add_subparsers(required=True, dest="command")
    for module in COMMANDS:
        module.add_commands(commands)
    args = parser.parse_args(argv)
    with one_line_errors():
        return args.run(args)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
