"""Processes, devices and kernels: the only place that knows CUDA, gloo, Slurm, MPI, Transformer Engine and apex.

Import from the modules: `processes` and `kernels` are light, `engine` loads torch and megatron-core.
"""
