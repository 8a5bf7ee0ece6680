"""The same as the console script `qwenvl-torchrun`: see megatron_qwenvl/runtime/torchrun.py."""

from megatron_qwenvl.runtime.torchrun import run

if __name__ == "__main__":
    run()
