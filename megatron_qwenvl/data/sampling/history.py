"""The data of a run's steps over all changes of that data.

A run is a list of segments, one for each change of batch size, mixture, shards or skipped steps. Together with the
shards (`epochs.py`) they make a batch a pure function of (history, step). A run without a change has one segment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .epochs import Edition, Editions
from .mixture import Mixture

StepRange = tuple[int, int]
"""First and last step."""


@dataclass(frozen=True)
class SourceState:
    """A source at some step.

    Attributes:
        name: of the source.
        weight: its share of the mixture, relative to the other sources'.
        edition: number of its edition (`epochs.Edition`).
        position: samples that the edition has given.
    """

    name: str
    weight: float
    edition: int
    position: int


@dataclass(frozen=True)
class SkippedRange:
    """Data that is skipped when its turn comes.

    Attributes:
        steps: the range of `data.skip_steps` that says so.
        ranges: first position and length in the segment's stream.
    """

    steps: StepRange
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """Steps between two changes.

    Attributes:
        first_step: its first step, from 0.
        samples_per_step: batch size.
        stream: position in the mixture's stream of samples at which it begins.
        sources: the mixture, as its sources stand at the first step.
        skipped_ranges: data of the stream that is skipped, at `stream` or later.
    """

    first_step: int
    samples_per_step: int
    stream: int
    sources: tuple[SourceState, ...]
    skipped_ranges: tuple[SkippedRange, ...] = ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources."""
        return tuple(source.weight for source in self.sources)

    def ranges(self, step: int, steps: int = 1) -> list[tuple[int, int]]:
        """Return the positions of the stream, as first and length, that `steps` steps from `step` on are made of."""
        before, wanted = ((step - self.first_step) * self.samples_per_step, steps * self.samples_per_step)
        found: list[tuple[int, int]] = []
        position = self.stream
        gaps: list[tuple[float, int]] = sorted(
            gap for skipped in self.skipped_ranges for gap in skipped.ranges
        )
        for begin, length in [*gaps, (math.inf, 0)]:
            passed = int(min(before, begin - position))
            before, position = before - passed, position + passed
            taken = int(min(wanted, begin - position))
            if taken:
                found.append((position, taken))
                wanted -= taken
            if not wanted:
                break
            position = int(begin) + length
        return found

    def reached(self, step: int) -> int:
        """Return the position in the stream after the step before `step`."""
        if step == self.first_step:
            return self.stream
        first, count = self.ranges(step - 1)[-1]
        return first + count


@dataclass(frozen=True)
class DataHistory:
    """Everything that the order of a run's samples depends on, apart from the step.

    Attributes:
        segments: from old to new; where two begin at one step, the later one counts.
        editions: of every source that the run has had, by its name, from old to new.
        skip_steps: `data.skip_steps` as last given.
    """

    segments: tuple[Segment, ...]
    editions: Mapping[str, tuple[Edition, ...]]
    skip_steps: tuple[StepRange, ...] = ()


@dataclass(frozen=True)
class Draw:
    """Consecutive samples of the stream that belong to one step.

    Attributes:
        sources: where each source stands at its beginning.
        of_source: int32 `[N]`, for each sample the index into `sources`.
    """

    sources: tuple[SourceState, ...]
    of_source: NDArray[np.int32]


class Timeline:
    """Looks up segments, draws and states of every step of a history."""

    def __init__(self, history: DataHistory) -> None:
        self.history = history
        self.editions = {name: Editions(name, editions) for name, editions in history.editions.items()}

    def segment(self, step: int) -> Segment:
        """Return the segment that a step belongs to."""
        return [segment for segment in self.history.segments if segment.first_step <= step][-1]

    def draws(self, step: int) -> list[Draw]:
        """Return the draws of a step in order: one, or more where data in between is skipped."""
        segment = self.segment(step)
        mixture = _mixture(segment.weights)
        found = []
        for first, count in segment.ranges(step):
            of_source, drawn = mixture.split(first, count)
            found.append(Draw(self._advanced(segment, drawn), of_source))
        return found

    def states(self, step: int) -> dict[str, SourceState]:
        """Return every source that the run has had, as it stands before a step."""
        return {
            source.name: source for segment, end in self._until(step) for source in self._at(segment, end)
        }

    def consumed(self, step: int) -> dict[str, int]:
        """Count the samples that each source has given before a step, those of skipped steps included."""
        total = dict.fromkeys(self.history.editions, 0)
        for segment, end in self._until(step):
            for begin, source in zip(segment.sources, self._at(segment, end), strict=True):
                total[source.name] += source.position - begin.position
        return total

    def _until(self, step: int) -> Iterator[tuple[Segment, int]]:
        """Yield the segments before a step, and the step at which each ends."""
        segments = [segment for segment in self.history.segments if segment.first_step <= step]
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            yield segment, following.first_step if following else step

    def _at(self, segment: Segment, step: int) -> tuple[SourceState, ...]:
        return self._advanced(segment, _mixture(segment.weights).split(segment.reached(step), 0)[1])

    def _advanced(self, segment: Segment, drawn: Sequence[int]) -> tuple[SourceState, ...]:
        """Return the segment's sources once the mixture has drawn so many samples of each."""
        begin = _mixture(segment.weights).split(segment.stream, 0)[1]
        return tuple(
            replace(source, position=source.position + now - then)
            for source, now, then in zip(segment.sources, drawn, begin, strict=True)
        )


@functools.lru_cache(maxsize=8)
def _mixture(weights: tuple[float, ...]) -> Mixture:
    """Build the mixture of some weights: a table of a million entries, shared by all timelines of a process."""
    return Mixture(weights)
