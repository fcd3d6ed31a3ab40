from typing import Any

import pytest

from latentmodal.encoders import (
    IMAGE_ENCODERS,
    TEXT_ENCODERS,
    TOKENIZERS,
    HfImageConfig,
    HfTextConfig,
    TextTransformerConfig,
    TimmImageConfig,
    TransformersTokenizerConfig,
    WordTokenizerConfig,
)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (IMAGE_ENCODERS, {"timm": TimmImageConfig, "transformers": HfImageConfig}),
        (TEXT_ENCODERS, {"transformer": TextTransformerConfig, "transformers": HfTextConfig}),
        (TOKENIZERS, {"transformers": TransformersTokenizerConfig, "word": WordTokenizerConfig}),
    ],
)
def test_tables_hold_exactly_these_names(table: dict[str, Any], expected: dict[str, Any]) -> None:
    """Recipes name components by these keys: a rename breaks every recipe of every user."""
    assert table == expected
