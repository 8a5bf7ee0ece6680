"""Scores and report pages; nothing here loads a model.

metrics  scores of generated text against expected text
report   a report as one HTML page
curves   the loss curves of a run
charts   line charts as SVG
"""
