"""Frozen features on disk, which stand in for pictures in training.

In reading order: `key` (what decides the features), `store` (files), `reader`, `pictures` (what is
encoded). `latentmodal.experiments.feature_cache` fills such a folder and opens it for training.
"""
