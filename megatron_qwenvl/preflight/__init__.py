"""Checks before a run: `run` is the procedure, `probes` measure on every rank, `inputs` checks data and weights.

Rank 0 attributes problems to nodes or to the run (`rules`) and derives exit code and bad nodes (`verdict`). Ranks
communicate through the rendezvous store (`exchange`), so that missing ranks can be named,
with their node (`placement`).
"""
