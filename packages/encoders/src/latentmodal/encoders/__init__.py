"""Image and text encoders behind one interface.

`IMAGE_ENCODERS`, `TEXT_ENCODERS` and `TOKENIZERS` are the names a recipe may choose from; each maps
to a configuration whose `build()` makes the component.
"""

from latentmodal.encoders.activations import Activation, activation_of
from latentmodal.encoders.encoder import FeatureLayer, ImageEncoder, TextEncoder
from latentmodal.encoders.features import Features
from latentmodal.encoders.hf_image import HfImageConfig, HfImageEncoder
from latentmodal.encoders.hf_text import HfTextConfig, HfTextEncoder
from latentmodal.encoders.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from latentmodal.encoders.text_transformer import TextTransformer, TextTransformerConfig
from latentmodal.encoders.timm_image import TimmImageConfig, TimmImageEncoder
from latentmodal.encoders.tokenizers import (
    TextBatch,
    Tokenizer,
    TransformersTokenizer,
    TransformersTokenizerConfig,
    WordTokenizer,
    WordTokenizerConfig,
    train_word_tokenizer,
)

ImageEncoderConfig = TimmImageConfig | HfImageConfig
TextEncoderConfig = TextTransformerConfig | HfTextConfig
TokenizerConfig = TransformersTokenizerConfig | WordTokenizerConfig

IMAGE_ENCODERS: dict[str, type[TimmImageConfig] | type[HfImageConfig]] = {
    "timm": TimmImageConfig,
    "transformers": HfImageConfig,
}
TEXT_ENCODERS: dict[str, type[TextTransformerConfig] | type[HfTextConfig]] = {
    "transformer": TextTransformerConfig,
    "transformers": HfTextConfig,
}
TOKENIZERS: dict[str, type[TransformersTokenizerConfig] | type[WordTokenizerConfig]] = {
    "transformers": TransformersTokenizerConfig,
    "word": WordTokenizerConfig,
}

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGE_ENCODERS",
    "TEXT_ENCODERS",
    "TOKENIZERS",
    "Activation",
    "FeatureLayer",
    "Features",
    "HfImageConfig",
    "HfImageEncoder",
    "HfTextConfig",
    "HfTextEncoder",
    "ImageEncoder",
    "ImageEncoderConfig",
    "Preprocess",
    "TextBatch",
    "TextEncoder",
    "TextEncoderConfig",
    "TextTransformer",
    "TextTransformerConfig",
    "TimmImageConfig",
    "TimmImageEncoder",
    "Tokenizer",
    "TokenizerConfig",
    "TransformersTokenizer",
    "TransformersTokenizerConfig",
    "WordTokenizer",
    "WordTokenizerConfig",
    "activation_of",
    "train_word_tokenizer",
]
