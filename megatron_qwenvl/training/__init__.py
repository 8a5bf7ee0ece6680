"""The training of one training stage.

loop           the training loop
step           one step: micro-batches through the pipeline, the loss, one update
setup          everything before the first step
optimizer      AdamW's parameter groups, and the learning-rate schedule
loaders        the loaders of a rank
saving         saving of checkpoints during a run
metrics        a logged step's line, record and scalars
data_log       log of a step's data: skipped and unreadable samples
unreadable     window over unreadable samples
limits         limits at which a run ends with an error
progress       counters of a run
run_directory  files of a start in the run directory
errors         the error that ends a run
"""
