"""Frozen features instead of pictures: `filling` makes a cache, `opening` hands it to training."""
