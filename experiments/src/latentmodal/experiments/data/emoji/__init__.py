"""Embedded data: scenes of real emoji drawings with true captions, negatives and questions."""

from latentmodal.experiments.data.emoji.build import (
    EmojiData,
    build_emoji,
    emoji_captions,
    ensure_emoji,
    open_emoji,
)
from latentmodal.experiments.data.emoji.config import PRESETS, EmojiConfig, EmojiPreset
from latentmodal.experiments.data.emoji.drawings import TRAIN_STYLES, UNSEEN_STYLE
from latentmodal.experiments.data.emoji.splits import SPLITS

__all__ = [
    "PRESETS",
    "SPLITS",
    "TRAIN_STYLES",
    "UNSEEN_STYLE",
    "EmojiConfig",
    "EmojiData",
    "EmojiPreset",
    "build_emoji",
    "emoji_captions",
    "ensure_emoji",
    "open_emoji",
]
