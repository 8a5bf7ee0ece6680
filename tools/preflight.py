"""The same as the console script `qwenvl-preflight`: see megatron_qwenvl/commands/preflight.py."""

from megatron_qwenvl.commands.preflight import run

if __name__ == "__main__":
    run()
