"""Words of a caption as the Penn Treebank tokeniser of COCO's caption evaluation cuts them.

Published caption scores are taken on the tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1), lower
case, punctuation removed. This is a reading of those rules in one regular expression, without
Java: it differs on rarities (currency signs, typographic fractions, seldom abbreviations), see
`latentmodal.experiments.evaluation.captions.coco` for the original.
"""

import re
from typing import Final

# COCO's list. "!!" is not on it and stays a word; so does "-lrb-", since its list has capitals.
_PUNCTUATION: Final = frozenset({"'", '"', "`", "``", "''", *".?!,:;-", "--", "..."})
_BRACKETS: Final = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_TYPOGRAPHY: Final = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "–": " -- ",
        "—": " -- ",
        "…": "...",
        # Invisible: soft hyphen, zero-width space and (non-)joiners, byte-order mark.
        **dict.fromkeys("\xad\u200b\u200c\u200d\ufeff", ""),
    }
)
# Control characters and lone surrogates; PTBTokenizer drops what is beyond the basic plane.
_UNREADABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BEYOND_BASIC_PLANE: Final = re.compile(r"[\U00010000-\U0010ffff]")

_TOKEN: Final = re.compile(
    r"""
      https?://[^\s<>"()]*[^\s<>"().,;:!?'] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+  # addresses
    | </?[A-Za-z][^<>]*>                                            # a tag is one word
    | (?i:can(?=not\b) | g[oi](?:n(?=na\b)|t(?=ta\b)|m(?=me\b))     # can not, gon na, got ta
          | wan(?=na\b) | lem(?=me\b) | y'(?=all\b) | 't(?=(?:is|was)\b))
    | (?i:(?:o'clock | ma'am | 'em | 'cause | 'n'?)(?![\w'])) | '\d0s\b
    | (?i:(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|mt|prof|no(?=\.\s?\d))\.)
    | (?<![\w'-])[A-Za-z](?:(?:\.[A-Za-z])+(?!\w)\.? | \.(?![\w.])) # u.s., p.m., the J. of a name
    | (?<!\w)[-+]?\d+(?:[.,:/]\d+)+ | (?<!\w)[-+]\d+                # 1,000.5  12:30  3/4  -5
    | [A-Za-z]+?(?=n't\b) | n't\b | '(?i:s|m|d|re|ve|ll)\b          # is n't, man 's
    | (?i:[dolj]'[a-z]{2,})                                         # o'brien
    | [A-Z]+(?:[+&][A-Z]+)+                                         # AT&T
    | [^\W_]+(?:[-_.][^\W_]+)*(?:/[^\W_]+(?:-[^\W_]+)*){0,2}        # t-shirt, and/or
    | \#[A-Za-z]\w*
    | \.{3} | -{2,} | [!?]+ | \S
    """,
    re.VERBOSE,
)


def one_line(text: str) -> str:
    """``text`` without line separators of any alphabet, control characters, lone surrogates.

    Words stay apart by single spaces, so that a caption can be one line of a file: Java reads
    carriage returns, form feeds and U+2028 as ends of lines, which would move every later caption
    to another picture.
    """
    return " ".join(_UNREADABLE.sub(" ", text).split())


def tokenize(caption: str) -> tuple[str, ...]:
    """Lower-case words of a caption, punctuation removed; an empty caption has none."""
    text = _BEYOND_BASIC_PLANE.sub(" ", one_line(caption)).translate(_TYPOGRAPHY)
    words = (match.group() for match in _TOKEN.finditer(text))
    # Lowered last: capitals tell AT&T from "black&white".
    return tuple(_BRACKETS.get(word, word.lower()) for word in words if word not in _PUNCTUATION)
