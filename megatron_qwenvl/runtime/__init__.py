"""Processes, devices, signals, retries and Slurm queries.

Only this package and `engine/` know CUDA, gloo, Slurm and MPI. Nothing here imports megatron-core, and most modules do
not import torch: `devices` does, and `environment` when it is called.
"""
