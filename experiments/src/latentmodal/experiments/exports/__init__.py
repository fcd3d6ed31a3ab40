"""A dual encoder, or BLIP-2, under the names of other libraries with their configuration beside it.

The table is of dual encoders; BLIP-2's formats, which are read as well, are in `weights`.
"""

from collections.abc import Callable

from latentmodal.experiments.exports.export import Export
from latentmodal.experiments.exports.hf import hf_clip, hf_siglip
from latentmodal.experiments.exports.open_clip import open_clip
from latentmodal.experiments.systems.dual_encoder import DualEncoder

# The flag says whether a configuration is wanted, too, which not every tower can be given.
EXPORTS: dict[str, Callable[[DualEncoder, bool], Export]] = {
    "open_clip": open_clip,
    "hf_clip": hf_clip,
    "hf_siglip": hf_siglip,
}

__all__ = ["EXPORTS", "Export"]
