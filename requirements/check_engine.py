"""Say whether the installed Transformer Engine goes with the installed megatron-core.

    python requirements/check_engine.py

The Dockerfile runs it; it serves in any other GPU environment too. Exit code 0 if they go together, 1 otherwise. Where
the ranges come from is in docs/versions.md.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

# By megatron-core: the first Transformer Engine of the range, and the first one beyond it.
TRANSFORMER_ENGINE = {
    "0.16.1": ((2, 9), (2, 12)),
    "0.19.2": ((2, 10), (2, 19)),
}


def find_mismatch(megatron_core: str, transformer_engine: str) -> str | None:
    """One line that says what does not fit, or None."""
    if megatron_core not in TRANSFORMER_ENGINE:
        return f"expected megatron-core {' or '.join(TRANSFORMER_ENGINE)}, found {megatron_core}"
    first, beyond = TRANSFORMER_ENGINE[megatron_core]
    found = tuple(map(int, re.findall(r"\d+", transformer_engine)[:2]))
    if first <= found < beyond:
        return None
    return (
        f"megatron-core {megatron_core}: expected Transformer Engine {first[0]}.{first[1]} or newer and older than "
        f"{beyond[0]}.{beyond[1]}, found {transformer_engine}"
    )


def main() -> int:
    """Compare what is installed."""
    try:
        installed = version("megatron-core"), version("transformer-engine")
    except PackageNotFoundError as error:
        print(f"{error.name} is not installed", file=sys.stderr)
        return 1
    problem = find_mismatch(*installed)
    print(problem or "megatron-core {} goes with Transformer Engine {}".format(*installed))
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
