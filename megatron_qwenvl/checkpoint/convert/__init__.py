"""Conversions of weights, each planned and checked before a byte is written. None of them imports another.

imports        published weights into a weights checkpoint
exports        a checkpoint into the Hugging Face format
next_stage     the weights of a finished training stage as the start of the next one
inspect        description of a checkpoint, and everything that is wrong with it
compare        differences of two sets of weights

They share:

hf_source       weights in the Hugging Face format, checked
weights_source  weights of a checkpoint, checked
fresh_adapter   a newly initialized adapter
mapped_source   tensors of a source on their way into the other format
jobs            jobs in a few worker processes
record          record of a conversion in its result, for requeued jobs
progress_line   progress on the terminal
"""
