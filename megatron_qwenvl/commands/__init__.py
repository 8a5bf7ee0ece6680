"""The command-line programs: `tools/NAME.py` and the console script `qwenvl-...` both start `NAME.run`.

A module holds its program's arguments and `main`, and imports what takes time (torch, megatron-core, numpy) only after
the arguments were read, so that `--help` and wrong arguments answer at once and stop signals are answered meanwhile.
"""
