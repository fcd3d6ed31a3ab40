"""Templates rendered token by token: what is read, what is a target, what is cut."""

import pickle
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latentmodal.llm import IGNORE_INDEX, PromptTemplate, PromptWriter

X = IGNORE_INDEX
PAD, BOS, EOS, NEWLINE = 0, 1, 2, 4


@pytest.fixture
def words(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_blip2_opt_layout(tokenizer, words):
    """BLIP-2 with OPT: [pictures][</s> text line break], all text a target, its BOS too."""
    tokenizer.bos_token = "</s>"
    template = PromptTemplate(end="\n", label_bos=True)
    batch = PromptWriter(template, tokenizer, "causal", 3).train(
        [{"answer": "the cat sits"}, {"answer": "dog"}], [0, 0]
    )
    cat, dog = words("the cat sits"), words("dog")
    assert batch.ids_BT[:, 3:].tolist() == [[EOS, *cat, NEWLINE], [EOS, *dog, NEWLINE, PAD, PAD]]
    assert batch.labels_BT.tolist() == [
        [X, X, X, EOS, *cat, NEWLINE],
        [X, X, X, EOS, *dog, NEWLINE, X, X],
    ]
    assert batch.slot_mask_BT.tolist() == [[True] * 3 + [False] * 5] * 2
    assert batch.mask_BT.sum(dim=1).tolist() == [8, 6]
    assert (batch.num_targets, batch.slot_counts, batch.image_counts) == (8, [3, 3], [1, 1])
    assert batch.side == "right"


def test_only_answer_and_eos_are_targets(tokenizer, words):
    template = PromptTemplate(text="{bos}{image} Question: {question} Answer: {answer}{eos}")
    writer = PromptWriter(template, tokenizer, "causal", 2)
    batch = writer.train([{"question": "what is it ?", "answer": "cat"}], [0])
    text = words("Question : what is it ? Answer :")
    unknown = words("Question:")  # not a word of this tokenizer
    assert unknown == [3]
    asked = [3, *words("what is it ?"), 3]
    assert len(asked) == len(text) - 2
    assert batch.ids_BT.tolist() == [[BOS, PAD, PAD, *asked, *words("cat"), EOS]]
    assert batch.labels_BT.tolist() == [[X] * (3 + len(asked)) + [*words("cat"), EOS]]
    assert template.fields == ("question",)


def test_ask_is_the_training_prompt_without_its_answer(tokenizer):
    template = PromptTemplate(text="{image}{bos}{question} :{answer}{eos}", end="\n")
    writer = PromptWriter(template, tokenizer, "causal", 2)
    fields = [{"question": "what is it ?"}, {"question": "red"}]
    asked = writer.ask(fields)
    trained = writer.train([f | {"answer": "cat"} for f in fields], [0, 0])
    for row in range(2):
        ids = asked.ids_BT[row][asked.mask_BT[row]].tolist()
        assert ids == trained.ids_BT[row][trained.mask_BT[row]].tolist()[: len(ids)]
    assert not asked.mask_BT[1, 0] and bool(asked.mask_BT[:, -1].all())
    assert (asked.side, asked.end, asked.num_targets) == ("left", "\n", 0)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_only_the_answer_is_cut(tokenizer, words, kind):
    template = PromptTemplate(text="a big photo of {answer}{eos}", max_text_tokens=2)
    batch = PromptWriter(template, tokenizer, kind, 1).train([{"answer": "the red cat sits"}], [0])
    prompt, said = words("a big photo of"), [*words("the red"), EOS]
    if kind == "causal":
        assert batch.ids_BT.tolist() == [[*prompt, *said]]
    else:
        assert batch.ids_BT.tolist() == [[*prompt, EOS]]
        assert batch.labels_BS.tolist() == [said]


def test_seq2seq_layout(tokenizer, words):
    template = PromptTemplate(text="{image}{bos}a photo of{answer}{eos}")
    writer = PromptWriter(template, tokenizer, "seq2seq", 2)
    batch = writer.train([{"answer": "the cat"}, {"answer": "dog"}], [0, 0])
    read = [PAD, PAD, BOS, *words("a photo of"), EOS]
    assert batch.ids_BT.tolist() == [read, read]
    assert batch.labels_BS.tolist() == [[*words("the cat"), EOS], [*words("dog"), EOS, X]]
    assert (batch.num_targets, batch.is_padded) == (5, False)
    asked = writer.ask([{}])
    assert asked.ids_BT.tolist() == [read]
    assert (asked.num_targets, asked.labels_BS.shape) == (0, (1, 0))


def test_prefix_split_covers_one_to_half(tokenizer, words):
    """Every draw splits between the first word and the middle; nothing is lost or said twice."""
    writer = PromptWriter(PromptTemplate(prefix_split=True), tokenizer, "seq2seq", 1)
    answer = "the big red cat sits on"
    lengths = set()
    for draw in range(7):
        batch = writer.train([{"answer": answer}], [draw])
        ids, labels = batch.ids_BT[0].tolist(), batch.labels_BS[0].tolist()
        assert ids[:2] == [PAD, BOS] and ids[-1] == EOS and labels[-1] == EOS
        assert ids[2:-1] + labels[:-1] == words(answer)
        lengths.add(len(ids) - 3)
    assert lengths == {1, 2, 3}
    single = writer.train([{"answer": "cat"}], [5])
    assert single.labels_BS[0].tolist() == [*words("cat"), EOS]


@pytest.fixture
def byte_level():
    """Bytes as tokens, but for " x"; EOS is 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(["</s>", *letters, "Ġx"])}
    rust = Tokenizer(models.BPE(vocab, [("Ġ", "x")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>")


def test_special_tokens_in_an_answer_are_text(byte_level):
    """A caption that holds `</s>` must not end the answer."""
    writer = PromptWriter(PromptTemplate(text="{answer}{eos}"), byte_level, "causal", 1)
    ids = writer.train([{"answer": "cat</s>"}], [0]).ids_BT[0].tolist()
    assert byte_level.convert_ids_to_tokens(ids) == [*"cat</s>", "</s>"]


def test_space_before_answer_goes_with_it_for_byte_level(byte_level):
    writer = PromptWriter(PromptTemplate(text="A: {answer}{eos}"), byte_level, "causal", 1)
    ids = writer.train([{"answer": "x"}], [0]).ids_BT[0].tolist()
    assert byte_level.convert_ids_to_tokens(ids) == ["A", ":", "Ġx", "</s>"]
    assert byte_level.convert_ids_to_tokens(writer.ask([{}]).ids_BT[0].tolist()) == ["A", ":"]


def test_writer_can_be_pickled(tokenizer):
    writer = PromptWriter(PromptTemplate(), tokenizer, "causal", 2)
    copy = pickle.loads(pickle.dumps(writer))  # noqa: S301
    fields = [{"answer": "the cat"}]
    assert copy.train(fields, [0]).ids_BT.tolist() == writer.train(fields, [0]).ids_BT.tolist()


def test_missing_field_is_named(tokenizer):
    writer = PromptWriter(PromptTemplate(text="{question}{answer}"), tokenizer, "causal", 1)
    with pytest.raises(ValueError, match="field 'question', the sample has answer"):
        writer.train([{"answer": "cat"}], [0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "{image}"}, "has 0 {answer} fields"),
        ({"text": "{answer}{answer}"}, "has 2 {answer} fields"),
        ({"text": "{answer} then {eos}"}, "only {eos} may stand after"),
        ({"text": "{answer"}, "write {{ for a brace"),
        ({"text": "{0}{answer}"}, "plain names"),
        ({"text": "{question!r}{answer}"}, "plain names"),
        ({"end": ""}, "end is empty"),
        ({"max_text_tokens": 0}, "at least 1"),
    ],
)
def test_templates_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PromptTemplate(**fields)


def test_writer_refuses_what_cannot_be(tokenizer):
    with pytest.raises(ValueError, match="prefix_split needs a seq2seq"):
        PromptWriter(PromptTemplate(prefix_split=True), tokenizer, "causal", 1)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        PromptWriter(PromptTemplate(), tokenizer, "causal", 1)
