"""All mutants. To prove a promise, add a line to the file of its subject and run `make mutants MUTANTS=word`."""

from __future__ import annotations

from .engine import TOUCH_POINTS
from .families import FAMILIES
from .jobs import JOBS
from .model import INITIALIZATION, MODEL
from .mutant import Mutant
from .samples import DATA, INFERENCE
from .training import LOSS, NUMBERS, OPTIMIZATION

MUTANTS: tuple[Mutant, ...] = (
    *LOSS,
    *OPTIMIZATION,
    *NUMBERS,
    *MODEL,
    *INITIALIZATION,
    *DATA,
    *INFERENCE,
    *TOUCH_POINTS,
    *FAMILIES,
    *JOBS,
)
