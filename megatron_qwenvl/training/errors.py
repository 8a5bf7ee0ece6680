"""Error that ends a run."""


class TrainingError(RuntimeError):
    """The run cannot usefully continue; the message names the reason and the step."""
