"""The same as the console script `qwenvl-make-demo-data`: see megatron_qwenvl/commands/make_demo_data.py."""

from megatron_qwenvl.commands.make_demo_data import run

if __name__ == "__main__":
    run()
