"""Scores of generated captions against the references of their pictures."""

from collections.abc import Sequence

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions.bleu import bleu
from latentmodal.experiments.evaluation.captions.cider import cider_d
from latentmodal.experiments.evaluation.captions.coco import coco_metrics
from latentmodal.experiments.evaluation.captions.rouge import rouge_l
from latentmodal.experiments.evaluation.captions.tokenize import tokenize


def caption_metrics(
    references: Sequence[Sequence[str]], candidates: Sequence[str], *, with_java: bool = False
) -> dict[str, float]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, as COCO's caption evaluation takes them.

    All are 1/100 of the figures in papers: BLEU and ROUGE-L lie in [0, 1], CIDEr-D in [0, 10].
    CIDEr-D weighs words by how few of the pictures given here have them in a reference, so scores
    of different sets are not comparable.

    Args:
        references: the captions of each picture, one or more.
        candidates: the one generated caption of each picture; it may be empty.
        with_java: also METEOR, and SPICE where its parts are present, and all others, by
            pycocoevalcap on Stanford's own tokens.

    Raises:
        UserError: the two differ in length, are empty, or a picture has no reference; with Java,
            see `coco_metrics`.
    """
    check(references, candidates)
    if with_java:
        return coco_metrics(references, candidates)
    candidate_tokens = [tokenize(candidate) for candidate in candidates]
    reference_tokens = [[tokenize(reference) for reference in own] for own in references]
    values = bleu(reference_tokens, candidate_tokens)
    cider = cider_d(reference_tokens, candidate_tokens)
    return {
        **{f"BLEU-{n}": value for n, value in enumerate(values, 1)},
        "ROUGE-L": rouge_l(reference_tokens, candidate_tokens),
        "CIDEr-D": sum(cider) / len(cider),
    }


def check(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> None:
    """Refuse what cannot be scored.

    Raises:
        UserError: see `caption_metrics`.
    """
    if len(references) != len(candidates):
        raise UserError(
            f"{len(candidates)} captions for {len(references)} pictures: give one per picture"
        )
    if not candidates:
        raise UserError("no captions to score: check that the split is not empty")
    for row, own in enumerate(references):
        if isinstance(own, str):
            raise UserError(f"references[{row}] is a text: give the list of its captions")
        if not own:
            raise UserError(f"references[{row}] is empty: every picture needs a caption")
