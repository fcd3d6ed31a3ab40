"""Data: shards of any origin to batches (this package), and the embedded data set (``emoji``).

In reading order: `config`, `addresses`, `tar_reader`, `decode`, `faults`, `stream`, `eval_stream`,
`collate`, `loader`; and `shard_writer` the other way round. Names are imported from their modules,
so that the processes which draw the embedded data start without loading torch.
"""
