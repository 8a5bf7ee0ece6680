"""The same as the console script `qwenvl-demo`: see megatron_qwenvl/commands/demo.py."""

from megatron_qwenvl.commands.demo import run

if __name__ == "__main__":
    run()
