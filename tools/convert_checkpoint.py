"""The same as the console script `qwenvl-convert`: see megatron_qwenvl/commands/convert_checkpoint.py."""

from megatron_qwenvl.commands.convert_checkpoint import run

if __name__ == "__main__":
    run()
