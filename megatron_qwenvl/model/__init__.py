"""Modules of one pipeline stage, and the numbers that follow from the description in `architecture`.

stage            the front of the room: any contiguous slice of ViT, adapter and decoder
build            construction of a rank's pipeline stage: freezing, initial weights
layers           the list of layers
partition        this list cut into pipeline stages of nearly equal cost
flops            FLOPs of a micro-batch, layer by layer
shapes           shapes of all tensors, counts of parameters and bytes
engine_config    megatron-core's configurations of towers and adapter
specs            layer specs of both towers
patch_embedding  pixels to ViT input
adapter          patches to decoder tokens
positions        position tables and rotary frequencies
long_context     positions beyond the trained length, at inference
pixels           mean and standard deviation of pixels
"""
