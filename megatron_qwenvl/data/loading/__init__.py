"""Micro-batches from shards: the only room that reads samples during training.

loader                the front of the room: `build_loader`, the steps of a rank
collate               the packs of a micro-batch to the typed `Batch`
reader                one sample: its tokens, its pixels
workers, fork_server  worker processes that read ahead
"""
