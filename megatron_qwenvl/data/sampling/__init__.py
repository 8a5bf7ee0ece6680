"""The batch of step k: a pure function of (recipe, seed, k) and of the changes that the run's data has seen.

sampler           the front of the room: `StepSampler`, the batch of step k and each rank's micro-batches
sources           the opened sources of the mixture
mixture           which source each position of the stream comes from
epochs            the places of a source's samples in its endless order
source_sampler    the samples of one source at these places
permutation       the random order: hashes of a key
sample_table      samples as columns, and the limits on them
packing           samples to packs, packs to ranks
changes, history  what changes when the data of a run changes; `history_file` keeps it in a checkpoint
resume            the history with which a run starts or resumes
step_description  a step in words
"""
