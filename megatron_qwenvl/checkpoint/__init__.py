"""Checkpoints: saving and resuming runs, weights from stage to stage and in and out of published formats.

`manager` saves and resumes, `weights` starts a run from other weights, `convert` and `examine` work on
checkpoints without process groups and without building a model. Import from the modules: the converters do
not need the training engine.
"""
