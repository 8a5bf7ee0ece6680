"""Throughput of a recipe in several parallel layouts.

layouts     short runs, one for each layout
throughput  step time and rates from a run's metrics, as a table
"""
