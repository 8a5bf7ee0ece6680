"""Whether a run can start on these machines: `run` asks, `probes` measure on every rank, `judge` and `rules` conclude.

Ranks talk through the rendezvous store (`exchange`), so that also those can be named that never come (`placement`).
"""
