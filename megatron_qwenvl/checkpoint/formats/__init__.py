"""The two formats of weights: `megatron`, this project's checkpoints, and `hf`, Hugging Face's (and OpenCLIP's own).

names              which tensors of both formats hold the same weights
rules              the statement that some tensors of both formats do
mappings           how the tensors of one format become those of the other
hf_files           tensors in Hugging Face and OpenCLIP files
hf_config          configurations of the Hugging Face format
hf_decoder         what a decoder family adds to it
hf_families        the decoder families
hf_qwen            family `qwen`: Qwen-7B, and the decoder of Qwen-VL
hf_qwen2           family `qwen2`: Qwen2 and Qwen2.5
model_checks       published configurations against the model that is to hold the weights
config_comparison  a section of a configuration against expected values
config_keys        names of configuration keys, new and old
position_table     the adapter's constant table, which only the Hugging Face format stores
megatron_files     folders of distributed checkpoints, written without process groups
chunk_grid         chunks in which tensors are stored there
"""
