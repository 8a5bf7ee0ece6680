"""The two ways in which data can be bad."""

from __future__ import annotations


class DataError(Exception):
    """Stops the run: the message names the file and the reason."""


class SampleError(Exception):
    """Skips one sample: the message is the reason; whoever catches it knows the sample's key."""
