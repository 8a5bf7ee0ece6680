"""torchrun, but with the exit code of the process that failed first; torchrun's own is always 1."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, failure = error.get_first_failure()
        # A negative code is a signal; shells report it so.
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
