"""The reference implementation of COCO's caption metrics, where it and Java are installed.

pycocoevalcap brings what cannot be had without Java: METEOR and SPICE. Its tokeniser is called
here directly, for its own wrapper splits captions at separators that Java takes for line ends and
then gives every later caption to another picture, and writes into the installed package.
"""

import importlib
import importlib.util
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions.ngrams import Tokens
from latentmodal.experiments.evaluation.captions.tokenize import one_line

log = logging.getLogger(__name__)

_PACKAGE: Final = "pycocoevalcap"
_VERSION: Final = "1.2"
_TOKENIZER_JAR: Final = "stanford-corenlp-3.4.1.jar"
_TOKENIZER_CLASS: Final = "edu.stanford.nlp.process.PTBTokenizer"
_SPICE_JARS: Final = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# The list of COCO's caption evaluation; the bracket names are capital there, so never match.
_PUNCTUATION: Final = frozenset({"''", "'", "``", "`", *".?!,:;-", "--", "..."})


def coco_metrics(
    references: Sequence[Sequence[str]], candidates: Sequence[str]
) -> dict[str, float]:
    """Every metric of COCO's caption evaluation, by its own code; see `caption_metrics`.

    SPICE is left out, with a line in the log, unless its CoreNLP jars are already installed:
    pycocoevalcap would fetch them over an unprotected connection.

    Raises:
        UserError: pycocoevalcap or Java is missing, or Java failed.
    """
    if reason := missing():
        raise UserError(f"METEOR and SPICE: {reason}; or take the metrics that need no Java")
    flat = [reference for own in references for reference in own]
    tokens = ptb_tokenize([*candidates, *flat])
    # METEOR's protocol separates captions by bars.
    lines = [" ".join(words).replace("|||", " ") for words in tokens]
    later = iter(lines[len(candidates) :])
    truth = {row: [next(later) for _ in own] for row, own in enumerate(references)}
    made = {row: [line] for row, line in enumerate(lines[: len(candidates)])}

    bleu, _ = _scorer("bleu.bleu", "Bleu", 4).compute_score(truth, made, verbose=0)
    metrics = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
    others = {
        "METEOR": ("meteor.meteor", "Meteor"),
        "ROUGE-L": ("rouge.rouge", "Rouge"),
        "CIDEr-D": ("cider.cider", "Cider"),
        "SPICE": ("spice.spice", "Spice"),
    }
    if absent := missing_for_spice():
        log.warning("SPICE is left out: %s", absent)
        del others["SPICE"]
    for name, (module, scorer) in others.items():
        try:
            value, _ = _scorer(module, scorer).compute_score(truth, made)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise UserError(f"{name}: Java failed ({one_line(str(error))})") from error
        metrics[name] = float(value)
    return metrics


def missing() -> str | None:
    """What the reference implementation lacks here, with the remedy; None when it can run."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"{_PACKAGE} is not installed: pip install {_PACKAGE}=={_VERSION}"
    if shutil.which("java") is None:
        return "no `java` on the path: install a Java runtime"
    return None


def missing_for_spice() -> str | None:
    """What SPICE lacks besides; None when it can run."""
    folder = _folder() / "spice" / "lib"
    lacking = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    return f"put {' and '.join(lacking)} of CoreNLP 3.6.0 into {folder}" if lacking else None


def ptb_tokenize(captions: Sequence[str]) -> list[Tokens]:
    """Lower-case words by Stanford's PTBTokenizer, punctuation removed.

    Raises:
        UserError: Java failed, or gave another number of lines than captions.
    """
    jar = _folder() / "tokenizer" / _TOKENIZER_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), _TOKENIZER_CLASS]
    text = "".join(one_line(caption) + "\n" for caption in captions)
    result = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input=text.encode(), capture_output=True
    )
    if result.returncode != 0:
        reason = one_line(result.stderr.decode(errors="replace"))[:200]
        raise UserError(f"PTBTokenizer: Java failed ({reason})")
    lines = result.stdout.decode().split("\n")[:-1]
    if len(lines) != len(captions):
        raise UserError(f"PTBTokenizer: {len(lines)} lines for {len(captions)} captions")
    return [tuple(word for word in line.split() if word not in _PUNCTUATION) for line in lines]


def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations, f"{_PACKAGE} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def _scorer(module: str, name: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)(*arguments)
