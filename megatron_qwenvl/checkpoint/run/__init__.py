"""Checkpoints of a run, written and read by all ranks together.

manager             save, resume, retention: what the trainer calls
saving              a save in progress
sharded_folder      one folder of a checkpoint, written and read by all ranks
checkpoints_folder  changes of the run's checkpoints folder, made by rank 0
retention           removal of older checkpoints
search              the checkpoint to resume from
damage              damaged files, looked for by all ranks
load                a training checkpoint into this rank's shards
weights             initialization of a run from other weights
start               what a run would start from, by manifests alone
rewind              going back to an older checkpoint
space               disk space of a run's checkpoints
ranks               exchange of values and errors between ranks
owner               one owner of a run directory (with owner_entries, heartbeat, takeover)
"""
