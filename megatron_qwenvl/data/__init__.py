"""Way from records in tar shards to typed micro-batches. The rooms, in the order of their imports:

    records    accepted content of records: tasks, dialogues, markup, coordinates, text
    rendering  records to token ids with a loss mask
    shards     tars on disk, their samples and indices
    sampling   the batch of step k
    loading    micro-batches from shards, by worker processes

Used by several of them: `errors` (the two kinds of bad data), `images` (encoded images to pixels), `lru_cache`.
`docs/sample_path.md` follows a sample through them.
"""
