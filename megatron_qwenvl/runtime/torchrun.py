"""Run torchrun with the exit code of the process that failed first, and let the processes save at a stop signal.

    python -m megatron_qwenvl.runtime.torchrun --standalone --nproc-per-node 4 -m megatron_qwenvl.train --recipe ...

torchrun itself always exits with 1 on failure, kills its processes 30 s after a SIGTERM, and on SIGUSR1 dies and leaves
them running. This launcher forwards stop signals to the processes, which end when they have saved.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from .exit_codes import INTERRUPTED, SUCCESS
from .stop_signals import STOP_SIGNALS


def local_command(processes: int, *program: str) -> list[str]:
    """Command that runs `program` (a script, or `-m` and a module, with arguments) as processes on this machine."""
    local = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", __name__, *local, *program]


def forward_signal(number: int, _: FrameType | None) -> None:
    """Send a signal to all child processes; without any, let it end this process."""
    import psutil

    processes = psutil.Process().children()
    for process in processes:
        process.send_signal(number)
    if not processes:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nOptions before the program: `python -m torch.distributed.run --help`.")
        return SUCCESS
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        # torchrun would leave a log directory of its own behind.
        with tempfile.TemporaryDirectory(prefix="torchelastic_") as logs:
            # torchrun itself ends its processes at these two signals.
            torchrun(["--signals-to-handle", "SIGHUP,SIGQUIT", "--log-dir", logs, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != INTERRUPTED:
            print(error, file=sys.stderr)
        # A negative exit code is a signal; shells report 128 + the signal.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return SUCCESS


def run() -> NoReturn:
    """Run the program and exit with its code."""
    for stop in STOP_SIGNALS:
        if signal.getsignal(stop) != signal.SIG_IGN:  # a shell lets its background jobs ignore Ctrl-C
            signal.signal(stop, forward_signal)
    sys.exit(main())


if __name__ == "__main__":
    run()
