"""Judging every text by the rules; a later judgement replaces an earlier one."""

from __future__ import annotations

from collections import Counter

from latentmodal.experiments.curation.ledger import Filtered, Ledger
from latentmodal.experiments.curation.rules import Rules, find_fault


def filter_ledger(ledger: Ledger, rules: Rules, by: str) -> Counter[str]:
    """Judge the newest text of every record; how many were kept, or dropped by which rule.

    What a person has decided on is left alone, and counted as "reviewed". A judgement that changes
    nothing is not written again.

    Raises:
        UserError: another process writes the ledger.
    """
    counts: Counter[str] = Counter()
    with ledger:
        events = []
        for record in ledger:
            if record.review is not None:
                counts["reviewed"] += 1
                continue
            reason = find_fault(record.text, rules)
            counts["kept" if reason is None else reason.partition(":")[0]] += 1
            if not record.filtered or record.rule != reason:
                events.append(Filtered(id=record.id, by=by, reason=reason))
        if events:
            ledger.append(*events)
    return counts
