"""Caption metrics and names in captions: by hand, by stored figures, against pycocoevalcap."""

import importlib
import logging
import math
import random

import pytest

from latentmodal.experiments.data.emoji import grammar
from latentmodal.experiments.data.emoji.vocabulary import DEFAULT_THINGS
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.captions import (
    NameFinder,
    caption_metrics,
    coco,
    named_things,
    one_line,
    tokenize,
)
from latentmodal.experiments.evaluation.captions.bleu import bleu
from latentmodal.experiments.evaluation.captions.cider import cider_d
from latentmodal.experiments.evaluation.captions.rouge import rouge_l
from latentmodal.experiments.evaluation.report import EvalReport, captions_section, naming_section

SEPARATORS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x00"]

REFERENCES = [
    ["A man's dog runs, fast!", "a dog (brown) is running on the grass.", "The dog runs."],
    ["two red apples on a white t-shirt", "There are 2 red apples; isn't it?"],
    ['A sign that says "STOP" in the U.S.', "a stop sign at 12:30 p.m. on St. John street"],
    ["a black and white cat -- asleep", "a cat sleeping\u2028on a couch", "cat, couch"],
]
CANDIDATES = ["a dog runs on the grass", "Two red apples.", "", "a cat\ron a couch, asleep"]
STORED = {
    "BLEU-1": 0.4493289640573112,
    "BLEU-2": 0.3891302975265337,
    "BLEU-3": 0.2830595100658656,
    "BLEU-4": 3.6100365916406337e-05,
    "METEOR": 0.25461493658076273,
    "ROUGE-L": 0.552516481988959,
    "CIDEr-D": 1.7263742653520104,
}
"""pycocoevalcap 1.2 with Java 17 on the captions above."""

TOKENS = [
    ("A man's dog, isn't it?", "a man 's dog is n't it"),
    ("can't cannot won't", "ca n't can not wo n't"),
    ("(two) [x] {y}", "-lrb- two -rrb- -lsb- x -rsb- -lcb- y -rcb-"),
    ("an old-fashioned t-shirt and/or x-ray", "an old-fashioned t-shirt and/or x-ray"),
    ("the U.S. flag at 5 p.m.", "the u.s. flag at 5 p.m."),
    ("St. Louis vs. Mr. Smith.", "st. louis vs. mr. smith"),
    ("it costs 1,000.50 at 12:30, 3/4", "it costs 1,000.50 at 12:30 3/4"),
    ("“curly” ‘quotes’ it’s a—b…", "curly quotes it 's a b"),
    ("AT&T and b&w 50%", "at&t and b & w 50 %"),
    ("hello!! what?! why?", "hello !! what ?! why"),
    ("dog,cat;bird", "dog cat bird"),
    (". , ; : ! ? - -- ...", ""),
    ("", ""),
]
"""By the rules of the Penn Treebank; with Java they are compared with Stanford's own."""

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None,
    reason="pycocoevalcap is not installed (it is one of the dev extras)",
)
needs_java = pytest.mark.skipif(coco.missing() is not None, reason=str(coco.missing()))


def words(*captions: str) -> list[tuple[str, ...]]:
    return [tuple(caption.split()) for caption in captions]


def scene_captions(count: int) -> tuple[list[list[str]], list[str]]:
    """Captions of pairs of things, and candidates from perfect to empty."""
    draw = random.Random(5)
    things = [name for names in DEFAULT_THINGS.values() for name in names]
    references, candidates = [], []
    for row in range(count):
        a, b = (grammar.noun_phrase(name) for name in draw.sample(things, 2))
        references.append(
            [f"{a} above {b}", f"{b} below {a}", f"A drawing of {a} and {b}."][: 1 + row % 3]
        )
        wrong = grammar.noun_phrase(draw.choice(things))
        candidates.append(
            draw.choice([references[-1][0], f"there is {a}, above {wrong}", f"({wrong})", ""])
        )
    return references, candidates


@pytest.mark.parametrize(("caption", "expected"), TOKENS)
def test_tokens_are_those_of_the_penn_treebank(caption, expected):
    assert tokenize(caption) == tuple(expected.split())


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separators_part_words_and_nothing_else(separator):
    assert one_line(f"a cat{separator}{separator}on a mat{separator}") == "a cat on a mat"
    assert tokenize(f"a cat{separator}on a mat") == ("a", "cat", "on", "a", "mat")


def test_lone_surrogates_and_pictographs_are_dropped():
    assert tokenize("a \ud83d cat\udc00 x\U0001f600y") == ("a", "cat", "x", "y")
    one_line("a\ud800b").encode()


def test_bleu_by_hand():
    # Clipped: "the" counts twice of seven; no bigram matches.
    references, candidates = [words("the cat is on the mat")], words("the the the the the the the")
    first, second, *_ = bleu(references, candidates)
    assert first == pytest.approx(2 / 7, abs=1e-9)
    assert 0 < second < 1e-6


@pytest.mark.parametrize(
    ("own", "brevity"),
    [
        (words("a b c d", "a b c d e f"), math.exp(1 - 4 / 3)),  # 4 is closer than 6
        (words("a b c d", "a b"), 1.0),  # both are one away: the shorter
        (words("a b c d", "a b c"), 1.0),
    ],
)
def test_bleu_takes_the_closest_length_and_of_two_the_shorter(own, brevity):
    assert bleu([own], words("a b c"))[0] == pytest.approx(brevity, abs=1e-8)


def test_bleu_sums_over_the_corpus():
    # 3 of 3 and 1 of 3 unigrams.
    references = [words("a b c"), words("x y z")]
    assert bleu(references, words("a b c", "x q q"))[0] == pytest.approx(4 / 6, abs=1e-9)


def test_rouge_takes_precision_and_recall_from_different_references():
    # Longest common subsequences 2 (of 5) and 1 (of 1): precision 2/3, recall 1.
    score = rouge_l([words("a x y z b", "c")], words("a b c"))
    precision, recall, beta = 2 / 3, 1.0, 1.2
    by_hand = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert score == pytest.approx(by_hand, abs=1e-12)


def test_rouge_keeps_order_and_may_leave_gaps():
    assert rouge_l([words("a b c d")], words("a c")) > rouge_l([words("a b c d")], words("c a"))
    assert rouge_l([words("a")], words("b")) == 0.0


def test_cider_by_hand():
    # Two pictures without a word in common: every n-gram weighs log 2. Of the first, unigrams
    # agree to 1/2, nothing longer; lengths are equal. The second is its own reference; it has no
    # 3- and 4-grams.
    scores = cider_d([words("a b"), words("c d")], words("a x", "c d"))
    assert scores == pytest.approx([10 * (1 / 2) / 4, 10 * 2 / 4], abs=1e-12)


def test_cider_clips_repetition_and_punishes_length_in_bigrams():
    once, thrice = (
        cider_d([words("a b"), words("c d")], words(text, "c d"))[0] for text in ("a b", "a a a b")
    )
    # Unigrams: (1 + 1) / (sqrt(10) sqrt(2)); bigrams a-b of {a-a: 2, a-b: 1}: 1 / sqrt(5);
    # three bigrams against one.
    penalty = math.exp(-((3 - 1) ** 2) / 72)
    assert once == pytest.approx(5.0)
    assert thrice == pytest.approx(10 / 4 * (2 / 20**0.5 + 1 / 5**0.5) * penalty, abs=1e-12)
    # One word has no bigram, as has no word: no penalty between one word and none.
    assert cider_d([words("a"), words("b")], words("a", "b"))[0] == pytest.approx(2.5)


def test_one_picture_has_no_cider():
    scores = caption_metrics([["a cat on a mat"]], ["a cat on a mat"])
    assert scores["CIDEr-D"] == 0.0
    assert scores["BLEU-4"] == pytest.approx(1.0, abs=1e-8)


def test_identical_captions_are_best():
    references = [["a cat on a mat"], ["two dogs in the park"], ["a red bus is here"]]
    scores = caption_metrics(references, [own[0] for own in references])
    assert scores["CIDEr-D"] == pytest.approx(10.0)
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(1.0, abs=1e-8)


def test_empty_candidates_score_nothing_and_break_nothing():
    scores = caption_metrics([["a cat"], ["a dog"]], ["", " . "])
    assert scores == pytest.approx(dict.fromkeys(scores, 0.0), abs=1e-12)


def test_stored_figures():
    """The whole Java-free path, where pycocoevalcap need not be installed."""
    expected = {name: value for name, value in STORED.items() if name != "METEOR"}
    assert caption_metrics(REFERENCES, CANDIDATES) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_separator_moves_no_caption_to_another_picture(separator):
    references = [["a red cat"], ["two dogs"], ["a blue bus"]]
    candidates = ["a red cat", "two dogs", "a blue bus"]
    broken = [candidates[0].replace(" ", separator), *candidates[1:]]
    assert caption_metrics(references, broken) == caption_metrics(references, candidates)


@pytest.mark.parametrize(
    ("references", "candidates", "message"),
    [
        ([["a"], ["b"]], ["a"], "1 captions for 2 pictures"),
        ([], [], "no captions to score"),
        ([["a"], []], ["a", "b"], r"references\[1\] is empty"),
        (["a cat"], ["a cat"], r"references\[0\] is a text"),
    ],
)
def test_what_cannot_be_scored_is_refused(references, candidates, message):
    with pytest.raises(UserError, match=message):
        caption_metrics(references, candidates)


@needs_package
@pytest.mark.parametrize("num_pictures", [1, 2, 25])
def test_scorers_equal_those_of_pycocoevalcap(num_pictures):
    draw = random.Random(num_pictures)

    (vocabulary,) = words("a b c the dog cat runs")

    def caption(least: int) -> tuple[str, ...]:
        return tuple(draw.choices(vocabulary, k=draw.randint(least, 9)))

    references = [[caption(1) for _ in range(draw.randint(1, 5))] for _ in range(num_pictures)]
    candidates = [caption(0) for _ in range(num_pictures)]
    truth = {row: [" ".join(tokens) for tokens in own] for row, own in enumerate(references)}
    made = {row: [" ".join(tokens)] for row, tokens in enumerate(candidates)}

    def theirs(module: str, name: str, **options: int):
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
        return scorer.compute_score(truth, made, **options)

    expected_bleu, _ = theirs("bleu.bleu", "Bleu", verbose=0)
    assert bleu(references, candidates) == pytest.approx(expected_bleu, abs=1e-12)
    expected_rouge, _ = theirs("rouge.rouge", "Rouge")
    assert rouge_l(references, candidates) == pytest.approx(expected_rouge, abs=1e-12)
    _, expected_cider = theirs("cider.cider", "Cider")
    assert cider_d(references, candidates) == pytest.approx(list(expected_cider), abs=1e-12)


@needs_java
def test_java_and_the_java_free_path_agree(caplog):
    references, candidates = scene_captions(40)
    references, candidates = references + REFERENCES, candidates + CANDIDATES
    with caplog.at_level(logging.WARNING):
        theirs = caption_metrics(references, candidates, with_java=True)
    ours = caption_metrics(references, candidates)
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, abs=1e-9)
    assert 0 < theirs["METEOR"] < 1
    assert ("SPICE" in theirs) == (coco.missing_for_spice() is None)
    assert ("SPICE is left out" in caplog.text) == ("SPICE" not in theirs)


@needs_java
def test_java_tokens_stay_with_their_captions():
    captions = [f"caption {row}{sign}of a cat" for row, sign in enumerate(SEPARATORS)]
    captions = ["", "a \ud83d cat", *captions, *(caption for caption, _ in TOKENS), ""]
    assert coco.ptb_tokenize(captions) == [tokenize(caption) for caption in captions]


def test_missing_parts_are_named(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(coco.shutil, "which", lambda _: None)
        patch.setattr(coco.importlib.util, "find_spec", lambda _: object())
        with pytest.raises(UserError, match="install a Java runtime"):
            caption_metrics([["a"]], ["a"], with_java=True)
        patch.setattr(coco.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UserError, match="pip install pycocoevalcap"):
            caption_metrics([["a"]], ["a"], with_java=True)
    monkeypatch.setattr(coco, "_folder", lambda: tmp_path)
    assert "stanford-corenlp-3.6.0-models.jar" in (coco.missing_for_spice() or "")
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "spice" / "lib" / name).touch()
    assert coco.missing_for_spice() is None


VOCABULARY = [
    *("fish", "tropical fish", "mushroom", "cherries", "fox", "sun", "sunflower", "socks"),
    *("ear", "ear of corn", "t-shirt", "Christmas tree", "snowman", "game die", "popcorn"),
]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two mushrooms and a fox", {"mushroom", "fox"}),
        ("three foxes, some cherries", {"fox", "cherries"}),
        ("two tropical fish", {"tropical fish"}),
        ("a tropical fish and a fish", {"tropical fish", "fish"}),
        ("a sunflower", {"sunflower"}),
        ("the Sun above two sunflowers.", {"sun", "sunflower"}),
        ("two pairs of socks", {"socks"}),
        ("two ears of corn", {"ear of corn"}),
        ("an ear and a christmas tree", {"ear", "Christmas tree"}),
        ("a red t-shirt, two snowmen", {"t-shirt", "snowman"}),
        ("four game\u2028dice and some popcorn", {"game die", "popcorn"}),
        ("a fox-like firefox mushroom's", {"mushroom"}),
        ("nothing known", set()),
        ("", set()),
    ],
)
def test_names_are_found(caption, expected):
    assert NameFinder(VOCABULARY).find(caption) == expected


def test_every_phrase_of_the_grammar_is_understood():
    things = [name for names in DEFAULT_THINGS.values() for name in names]
    finder = NameFinder(things)
    for name in things:
        counts = (1, 2, 3) if grammar.countable(name) else (1,)
        for count in counts:
            assert finder.find(f"there are {grammar.noun_phrase(name, count)} here") == {name}


def test_naming_by_hand():
    result = named_things(
        ["a fox and two mushrooms", "a fox", "the sun", "a fox and a sun"],
        [["fox", "mushroom", "mushroom"], ["fox", "sun"], ["fish"], ["fox"]],
        VOCABULARY,
    )
    # Right: 2 + 1 + 0 + 1 of 2 + 1 + 1 + 2 mentioned and of 2 + 2 + 1 + 1 true.
    assert (result.precision, result.recall, result.exact) == (4 / 6, 4 / 6, 1 / 4)
    assert (result.num_mentioned, result.num_true, result.num_pictures) == (6, 6, 4)


def test_captions_without_names_have_no_precision():
    result = named_things(["something"], [["fox"]], VOCABULARY)
    assert (result.precision, result.recall, result.exact) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("candidates", "names", "vocabulary", "message"),
    [
        (["a"], [], ["fox"], "1 captions for the names of 0"),
        ([], [], ["fox"], "check that the split is not empty"),
        (["a"], [["cat"]], ["fox"], "'cat' is the name of a thing but not in the vocabulary"),
        (["a"], [[]], [], "the vocabulary is empty"),
    ],
)
def test_naming_refuses_what_does_not_fit(candidates, names, vocabulary, message):
    with pytest.raises(UserError, match=message):
        named_things(candidates, names, vocabulary)


def test_sections_state_their_protocol():
    values = caption_metrics(REFERENCES, CANDIDATES)
    section = captions_section(values, REFERENCES)
    assert section.keys() == values.keys()
    cider = section["CIDEr-D"]
    assert (cider.unit, cider.n, cider.value) == ("score", 4, values["CIDEr-D"])
    for part in ("Java-free", "2 to 3 references", "IDF from the references of these 4 pictures"):
        assert part in cider.protocol
    assert "IDF" not in section["BLEU-4"].protocol
    with_java = captions_section(values, [["a"]] * 4, with_java=True)["BLEU-1"].protocol
    assert "Stanford PTBTokenizer" in with_java
    assert "; 1 references" not in with_java
    naming = naming_section(named_things(["a fox"], [["fox", "sun"]], VOCABULARY))
    assert {name: metric.value for name, metric in naming.items()} == {
        "names_exact": 0.0,
        "names_precision": 1.0,
        "names_recall": 0.5,
    }
    table = EvalReport(sections={"captions": {"CIDEr-D": cider}}).table()
    (cells,) = [list(column.cells) for column in table.columns if column.header == "value"]
    assert cells == [f"[bold]{100 * values['CIDEr-D']:.1f}"]
