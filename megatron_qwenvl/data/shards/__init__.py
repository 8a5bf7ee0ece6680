"""WebDataset tars on disk: their files, their samples, and the index beside each of them.

tar, tar_header  the files of a tar, from its headers alone
samples          which files of a tar are one sample; reading a file by its offset
members, media   which files of a sample are its text and images, and which are refused
indexing         builds the indices of a directory
index            the index of one shard; `index_builder` makes it
catalog          `manifest.json`: the few numbers of all indices that a start needs
listing          the tars of a directory
directory        an opened directory, checked for training
skipped          counts samples that are left out, by reason
"""
