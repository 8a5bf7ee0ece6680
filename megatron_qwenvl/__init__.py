"""Pre-training of Qwen-VL-style vision-language models on megatron-core."""

__version__ = "0.2.0"
