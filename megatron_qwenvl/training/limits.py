"""Limits at which a run ends with an error: too many steps without an update, too many unreadable samples."""

from __future__ import annotations

from collections.abc import Callable

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError

from .errors import TrainingError
from .progress import Progress
from .step import StepReport
from .unreadable import exceeds_share


def check_limits(
    config: RunConfig, progress: Progress, report: StepReport, worst_shards: Callable[[], str]
) -> None:
    """Check the limits after a step; the result is the same on every rank.

    Args:
        config: configuration of the run.
        progress: counters after the step.
        report: report of the step.
        worst_shards: gives the end of a message about unreadable samples; collective, called only if the run ends.

    Raises:
        TrainingError: too many consecutive steps without an update.
        DataError: too many unreadable samples.
    """
    _check_skipped_steps(config.train.max_skipped_steps, progress, report, worst_shards)
    _check_unreadable(config, progress, report, worst_shards)


def check_result(config: RunConfig, progress: Progress) -> None:
    """Check that a finished run has made at least one update.

    Raises:
        TrainingError: no step was applied.
    """
    if progress.step == config.train.steps and not progress.updates:
        raise TrainingError(f"step {progress.step}: the run has ended without a step that was applied")


def _check_skipped_steps(
    limit: int, progress: Progress, report: StepReport, worst_shards: Callable[[], str]
) -> None:
    if progress.skipped_in_a_row <= limit:
        return
    if report.loss_tokens:
        why = f"loss {report.loss} and gradient norm {report.grad_norm} are not finite"
    else:
        unreadable = f"{report.skipped_samples} of its {report.samples} samples could not be read"
        why = f"no supervised token: {unreadable}{worst_shards()}"
    raise TrainingError(
        f"step {progress.step}: {why}; no update for {progress.skipped_in_a_row} steps in a row "
        f"(train.max_skipped_steps {limit})"
    )


def _check_unreadable(
    config: RunConfig, progress: Progress, report: StepReport, worst_shards: Callable[[], str]
) -> None:
    window, share = config.data.unreadable_window, config.data.max_unreadable_share
    if not exceeds_share(progress.recent_unreadable, report.samples, window, share):
        return
    count, newest = sum(count for _, count in progress.recent_unreadable), max(window, report.samples)
    raise DataError(
        f"step {progress.step}: {count} of the newest {min(newest, progress.samples)} samples could not be read; "
        f"data.max_unreadable_share {share} allows {int(share * newest)}{worst_shards()}"
    )
