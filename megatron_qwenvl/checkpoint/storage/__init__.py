"""Files of checkpoints, without the training engine.

errors             `CheckpointError`
reading            files in place and in blocks, repeated while the file system refuses
writing            durable files with their digest
file_checks        files against recorded sizes and digests
new_directory      directories that get their name when they are complete
json_text          JSON that others wrote
manifest           description of a checkpoint with size and digest of every file
run_folder         names of a run's checkpoints, and which ones are there
lineage            which weights may start which training stage
tensors            shape, type and source of tensors
safetensors_files  safetensors, read tensor by tensor and written in one pass
differences        how much two tensors differ
non_finite         NaN and infinity in tensors
"""
