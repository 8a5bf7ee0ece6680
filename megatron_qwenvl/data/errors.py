"""The two kinds of bad data: one stops the run, the other costs a sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(Exception):
    """Stops the run: the message names the file and the reason."""


class SampleError(Exception):
    """Skips one sample: the message is the reason; the caller that catches it knows the sample's key."""


@contextmanager
def only_this_sample() -> Iterator[None]:
    """Turn any unforeseen exception into a SampleError.

    Whatever a library does with the bytes of one sample must end neither a run nor the indexing of a million others.
    """
    try:
        yield
    except (DataError, SampleError):
        raise
    except Exception as error:
        raise SampleError(f"cannot be used: {describe_exception(error)}") from error


def describe_exception(error: Exception) -> str:
    """Write type and message of a library's exception in one line; its message may be empty or long."""
    return " ".join(f"{type(error).__name__}: {str(error)[:200]}".split()).removesuffix(":")
