"""The text normalisation BLIP and BLIP-2 train with (Li et al. 2022, arXiv 2201.12086)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from latentmodal.experiments.data.sample import Sample

_MARKS = '.!"()*#:;~'
_TO_SPACE = str.maketrans(dict.fromkeys(_MARKS, " "))
_TO_NOTHING = str.maketrans(dict.fromkeys(_MARKS, ""))


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower case, a space for each of ``. ! " ( ) * # : ; ~``, single spaces, `max_words` words."""
    return _first_words(text.lower().translate(_TO_SPACE), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """As `clean_caption`, but the marks are deleted: "what's the no. 1?" keeps its words whole."""
    return _first_words(text.lower().translate(_TO_NOTHING), max_words)


def clean_sample(sample: Sample) -> Sample:
    """Captions, and the questions of its json, as LAVIS hands them to models; answers stay."""
    meta = sample.meta
    if isinstance(questions := meta.get("questions"), list):
        meta = {**meta, "questions": [_with_clean_question(entry) for entry in questions]}
    captions = [clean_caption(caption) for caption in sample.captions]
    return replace(sample, captions=captions, caption=clean_caption(sample.caption), meta=meta)


def _with_clean_question(entry: Any) -> Any:
    if isinstance(entry, dict) and isinstance(text := entry.get("question"), str):
        return {**entry, "question": clean_question(text)}
    return entry


def _first_words(text: str, count: int) -> str:
    if count < 1:
        raise ValueError(f"max_words={count} must be at least 1")
    return " ".join(text.split()[:count])
