"""Why a run stops."""


class TrainingError(RuntimeError):
    """The run cannot usefully go on; the message says why and at which step."""
