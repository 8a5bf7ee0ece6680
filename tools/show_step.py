"""The same as the console script `qwenvl-show-step`: see megatron_qwenvl/commands/show_step.py."""

from megatron_qwenvl.commands.show_step import run

if __name__ == "__main__":
    run()
