"""OK-VQA (Marino et al. 2019, arXiv 1906.00067): VQA's files over COCO's pictures.

``OpenEnded_mscoco_train2014_questions.json`` and ``mscoco_train2014_annotations.json``, which names
no one answer but lists ten (five people's, each twice) and says what knowledge a question needs:
``question_type`` is a key of the file's ``question_types``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from latentmodal.experiments.data.readers.annotations import Entry
from latentmodal.experiments.data.readers.vqav2 import VqaV2Reader
from latentmodal.experiments.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OkVqaReader(VqaV2Reader):
    """The whole file; ``answer`` is the answer given most often, of equals the first."""

    def _answered(self, annotation: Entry, given: list[str]) -> dict[str, Any]:
        if not given:
            raise UserError(f"{annotation.where}: 'answers' is empty")
        kind = annotation.text("question_type")
        return {
            "answer": Counter(given).most_common(1)[0][0],
            "answers": given,
            "kind": self._knowledge.get(kind, kind),
        }

    @property
    def _knowledge(self) -> dict[str, Any]:
        assert self.annotations is not None
        root = self.annotations.entry()
        return root.entry("question_types").value if "question_types" in root else {}
