"""The same as the console script `qwenvl-profile`: see megatron_qwenvl/commands/profile_throughput.py."""

from megatron_qwenvl.commands.profile_throughput import run

if __name__ == "__main__":
    run()
