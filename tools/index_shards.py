"""The same as the console script `qwenvl-index`: see megatron_qwenvl/commands/index_shards.py."""

from megatron_qwenvl.commands.index_shards import run

if __name__ == "__main__":
    run()
