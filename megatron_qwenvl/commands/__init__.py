"""The command-line programs: `tools/NAME.py` and the console script `qwenvl-...` both start `NAME.run`.

A module holds its program's arguments and `main`. It imports torch, megatron-core and numpy only after parsing the
arguments, so that `--help` and usage errors are printed at once and stop signals are handled during the imports.
"""
