"""Objectives as pure functions, the same on one process and on many.

Each rank passes its own rows. The mean of the returned losses over the ranks is the loss of the
full batch, and gradients averaged over the ranks, as DDP and FSDP average them, are those of the
full batch: for the encoders, the scale and the bias. `loss.backward()` must be called on the same
multiple of the loss on every rank.
"""

from latentmodal.bridges.losses.captioning import grounded_generation
from latentmodal.bridges.losses.contrastive_queries import (
    ContrastiveResult,
    image_text_contrastive,
)
from latentmodal.bridges.losses.info_nce import info_nce
from latentmodal.bridges.losses.matching import (
    Negatives,
    image_text_matching,
    sample_hard_negatives,
)
from latentmodal.bridges.losses.rows import global_mean
from latentmodal.bridges.losses.sigmoid import sigmoid_loss

__all__ = [
    "ContrastiveResult",
    "Negatives",
    "global_mean",
    "grounded_generation",
    "image_text_contrastive",
    "image_text_matching",
    "info_nce",
    "sample_hard_negatives",
    "sigmoid_loss",
]
