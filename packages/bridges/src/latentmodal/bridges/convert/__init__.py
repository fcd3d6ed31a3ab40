"""Q-Former weights of other projects to ours and back: pure functions from dict to dict."""

from latentmodal.bridges.convert.bert import qformer_from_bert
from latentmodal.bridges.convert.inference import QFormerConfigs, qformer_config_of
from latentmodal.bridges.convert.qformer import (
    Converted,
    qformer_from_hf,
    qformer_from_lavis,
    qformer_to_hf,
    qformer_to_lavis,
)

__all__ = [
    "Converted",
    "QFormerConfigs",
    "qformer_config_of",
    "qformer_from_bert",
    "qformer_from_hf",
    "qformer_from_lavis",
    "qformer_to_hf",
    "qformer_to_lavis",
]
