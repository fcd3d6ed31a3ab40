"""Contrastive losses as pure functions, the same on one process and on many.

Each rank passes its own rows. The mean of the returned losses over the ranks is the loss of the
full batch, and gradients averaged over the ranks, as DDP and FSDP average them, are those of the
full batch: for the encoders, the scale and the bias. `loss.backward()` must be called on the same
multiple of the loss on every rank.
"""

from latentmodal.bridges.losses.info_nce import info_nce
from latentmodal.bridges.losses.sigmoid import sigmoid_loss

__all__ = ["info_nce", "sigmoid_loss"]
