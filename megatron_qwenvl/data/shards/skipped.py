"""Samples that an index leaves out, counted by kind of reason, so that a few lines describe a million samples."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?")
_MAX_LENGTH = 160
_MAX_KINDS = 100
_OTHER = "other reasons"


@dataclass(frozen=True)
class SkippedKind:
    """Samples left out for the same kind of reason.

    Attributes:
        kind: the reason without names and numbers.
        count: how many samples.
        example: shard and key of the first one, `000003.tar:shapes/000017`.
        reason: that one's own reason.
    """

    kind: str
    count: int
    example: str
    reason: str

    def __str__(self) -> str:
        return f"{self.count} left out: {self.reason} (for example {self.example})"


def reason_kind(reason: str) -> str:
    """Take names and numbers out of a reason: `box (3, 3) is empty` and `box (4, 4) is empty` are one kind."""
    return _PARTICULARS.sub(lambda match: "'..'" if match[0][0] in "'\"" else "N", reason)[:_MAX_LENGTH]


def tally(shard: str, keys: Iterable[bytes], reasons: Iterable[bytes]) -> tuple[SkippedKind, ...]:
    """Count the reasons of one shard's index."""
    return merge(
        SkippedKind(reason_kind(reason), 1, f"{shard}:{key}", reason[:_MAX_LENGTH])
        for key, reason in (
            (printable(key.decode(errors="replace")), printable(reason.decode(errors="replace")))
            for key, reason in zip(keys, reasons, strict=True)
        )
    )


def printable(text: str) -> str:
    """Escape the characters of a text that move a cursor or cannot be encoded, for one line of a report."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def merge(kinds: Iterable[SkippedKind]) -> tuple[SkippedKind, ...]:
    """Add up equal kinds, the commonest first; what exceeds a hundred kinds becomes one."""
    found: dict[str, SkippedKind] = {}
    for item in kinds:
        name = item.kind if item.kind in found or len(found) < _MAX_KINDS else _OTHER
        first = found.get(name, SkippedKind(name, 0, item.example, item.reason))
        found[name] = SkippedKind(name, first.count + item.count, first.example, first.reason)
    return tuple(sorted(found.values(), key=lambda item: -item.count))


def commonest(kinds: Sequence[SkippedKind], count: int = 3) -> str:
    """Name the commonest kinds in one line."""
    return "; ".join(str(item) for item in heapq.nlargest(count, kinds, key=lambda item: item.count))
