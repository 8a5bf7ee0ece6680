"""Checkpoints of runs, and conversions of weights between training stages and into and out of the Hugging Face format.

storage   files, digests, manifests, lists of checkpoints
formats   tensors and configurations of the two formats: `megatron` (this project's) and `hf` (Hugging Face's)
convert   import, export, next stage, inspection and comparison, without process groups and without a model
run       save, resume and initialize a run; its owner

Import from the modules. `convert` and `run` never import each other.
"""
