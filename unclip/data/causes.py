"""Why samples are not used: the causes, and a tally of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

NO_PICTURE, NO_CAPTION, EMPTY_CAPTION = "no picture", "no caption", "empty caption"
FILTERED, TOO_LONG = "outside the filter", "picture above max_aspect"
LEFT_OUT = (NO_PICTURE, NO_CAPTION, EMPTY_CAPTION, FILTERED, TOO_LONG)
"""Causes that are no damage: a source may hold more than pairs."""

EMPTY_PICTURE, BAD_CAPTION = "picture of no bytes", "caption not in UTF-8 or no valid json"
BAD_NAME, CUT_OFF = "name that leads out of the tar", "cut off by the tar's end"
BAD_FILE = "file that cannot be read"

CORRUPT, TOO_LARGE = "corrupt picture", "picture above max_pixels"
CHANGED, UNREACHABLE = "file that has gone or changed", "address that cannot be reached"
WHILE_READING = (CORRUPT, TOO_LARGE, CHANGED, UNREACHABLE, TOO_LONG)
"""Causes that show when a sample is read."""

NAMES_KEPT = 3
"""Of each cause so many samples are named."""


@dataclass
class Tally:
    """How many samples are not used, by cause, and the first of each by name."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, names: Iterable[str], count: int | None = None) -> None:
        """Enter samples; `names` may be the first of `count`."""
        given = list(names)
        count = len(given) if count is None else count
        if count:
            self.counts[cause] = self.counts.get(cause, 0) + count
            self.names[cause] = [*self.names.get(cause, []), *given][:NAMES_KEPT]

    def update(self, other: Tally, prefix: str = "") -> None:
        """Enter what another has, its names after `prefix`."""
        for cause, count in other.counts.items():
            self.add(cause, [prefix + name for name in other.names[cause]], count)

    @property
    def bad(self) -> int:
        """Samples that are damaged, rather than left out."""
        return sum(n for cause, n in self.counts.items() if cause not in LEFT_OUT)

    def __str__(self) -> str:
        return ", ".join(f"{count} {cause}" for cause, count in sorted(self.counts.items()))
