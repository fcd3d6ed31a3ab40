"""Answers piece by piece: the same as all at once, and nothing of what ends them."""

import threading

import pytest
import torch

from latentmodal.llm import (
    ConversationTemplate,
    ConversationWriter,
    GenerationSettings,
    PromptTemplate,
    PromptWriter,
    Turn,
)
from latentmodal.llm.generation import answer_text, steady_text

ASKING = "{image}{bos}{question} : {answer}{eos}"
QUESTIONS = ["what is it ?", "red", "what is on the big red mat ? Question : is it a dog ?"]
LONG = GenerationSettings(num_beams=1, min_new_tokens=0, max_new_tokens=24)


def asked(lm, questions, end=None, **fields):
    writer = PromptWriter(PromptTemplate(text=ASKING, end=end), lm.tokenizer, lm.kind, 2)
    torch.manual_seed(3)
    pictures = torch.randn(len(questions), 2, lm.width).double()
    return [writer.ask([{"question": q}]) for q in questions], list(pictures)


def script(lm, monkeypatch, texts):
    """Make the model say ``texts``, whatever it was asked: one for each row, in turn."""
    rows = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    head = lm.model.get_output_embeddings()
    step = [0]

    def say(module, inputs, output):
        at, step[0] = step[0], step[0] + 1
        output = torch.zeros_like(output)
        for row in range(len(output)):
            said = rows[row % len(rows)]
            output[row, -1, said[at % len(said)]] = 1
        return output

    handle = head.register_forward_hook(say)
    monkeypatch.setattr(lm, "_script", handle, raising=False)
    return step


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@pytest.mark.parametrize("end", [None, "\n", "# #"])
def test_pieces_are_the_answer(make_lm, name, end):
    lm = make_lm(name)
    many = 0
    for batch, picture in zip(*asked(lm, QUESTIONS, end), strict=True):
        pieces = list(lm.stream(batch, picture[None], LONG))
        assert "".join(pieces) == lm.generate(batch, picture[None], LONG)[0]
        many = max(many, len(pieces))
    assert many > 1


def test_sampled_pieces_are_the_sampled_answer(make_lm):
    lm = make_lm("llama")
    settings = GenerationSettings(num_beams=1, do_sample=True, temperature=2.0, max_new_tokens=20)
    [batch], [picture] = asked(lm, QUESTIONS[:1])
    torch.manual_seed(5)
    whole = lm.generate(batch, picture[None], settings)[0]
    torch.manual_seed(5)
    assert "".join(lm.stream(batch, picture[None], settings)) == whole


def test_end_text_is_never_shown_in_part(make_lm, monkeypatch):
    """It takes three tokens, and begins once in vain."""
    lm = make_lm("llama")
    step = script(lm, monkeypatch, ["the cat # sits # # # dog runs"])
    [batch], [picture] = asked(lm, QUESTIONS[:1], "# # #")
    pieces = list(lm.stream(batch, picture[None], LONG))
    assert "".join(pieces) == "the cat # sits"
    assert all(not piece.endswith("#") for piece in pieces)
    assert len(pieces) == 3  # "the", " cat", " # sits"
    assert step[0] == 7


@pytest.mark.parametrize(
    ("text", "end", "shown"),
    [
        ("a cat ##", "###", "a cat"),
        ("a cat #5", "###", "a cat #5"),
        ("a cat ### dog", "###", "a cat"),
        ("a cat \n", "\n#", "a cat"),
        ("caf\ufffd", None, "caf"),
        (" a cat ", None, "a cat"),
    ],
)
def test_what_may_be_taken_back_is_held(text, end, shown):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return text

    assert steady_text([7], [], end, Tokenizer()) == shown
    assert answer_text([7], [], end, Tokenizer()).startswith(shown)


def test_closing_stops_the_model(make_lm, monkeypatch):
    lm = make_lm("llama")
    step = script(lm, monkeypatch, ["the cat"])
    [batch], [picture] = asked(lm, QUESTIONS[:1])
    before = set(threading.enumerate())
    stream = lm.stream(batch, picture[None], GenerationSettings(num_beams=1, max_new_tokens=40_000))
    assert next(stream) == "the"
    stream.close()
    assert step[0] < 4_000
    assert set(threading.enumerate()) == before


def test_errors_reach_the_caller(make_lm, monkeypatch):
    lm = make_lm("llama")

    def fail(*args):
        raise RuntimeError("no memory is left")

    lm.model.get_output_embeddings().register_forward_hook(fail)
    [batch], [picture] = asked(lm, QUESTIONS[:1])
    with pytest.raises(RuntimeError, match="no memory is left"):
        list(lm.stream(batch, picture[None], LONG))


def test_no_gradients_and_the_callers_autocast(make_lm):
    lm = make_lm("llama").float()
    seen = []
    lm.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append((output.dtype, output.requires_grad))
    )
    [batch], [picture] = asked(lm, QUESTIONS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(lm.stream(batch, picture[None].float(), LONG))
    assert set(seen) == {(torch.bfloat16, False)}


def test_streams_refused(make_lm):
    lm = make_lm("llama")
    writer = PromptWriter(PromptTemplate(text=ASKING), lm.tokenizer, lm.kind, 2)
    two = writer.ask([{"question": "red"}] * 2)
    with pytest.raises(ValueError, match="2 prompts cannot be streamed"):
        lm.stream(two, None, LONG)
    one = writer.ask([{"question": "red"}])
    with pytest.raises(ValueError, match="num_beams=5"):
        lm.stream(one, None, GenerationSettings())


def talks():
    long = [Turn("user", "what is it ?"), Turn("assistant", "the big red dog runs")]
    return [
        [Turn("user", "<image> what is it ?")],
        [Turn("user", "is the cat on <image> or on <image> ?"), *long[1:], Turn("user", "red ?")],
        [*long, *long, Turn("user", "what sits on the mat ?")],
        [Turn("user", "<image>")],
    ]


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("style", ["vicuna_v0", "vicuna_v1", "llama2_chat"])
def test_conversations_together_equal_one_by_one(make_lm, name, style):
    """Prompts of unequal lengths and numbers of pictures; `###` takes three tokens here."""
    lm = make_lm(name, config={"max_position_embeddings": 256})
    writer = ConversationWriter(ConversationTemplate(style=style), lm.tokenizer, lm.kind, 2)
    batch = writer.ask(talks())
    assert len(set(batch.mask_BT.sum(dim=1).tolist())) == 4
    torch.manual_seed(0)
    pictures = torch.randn(sum(batch.image_counts), 2, lm.width).double()
    together = lm.generate(batch, pictures, LONG)
    first = 0
    for conversation, answer, count in zip(talks(), together, batch.image_counts, strict=True):
        own = pictures[first : first + count]
        assert lm.generate(writer.ask([conversation]), own, LONG) == [answer]
        first += count
    assert len(set(together)) > 1


@pytest.fixture(params=["byte", "metaspace"])
def subword_lm(request, make_lm, bpe_tokenizers, tmp_path):
    tokenizer = bpe_tokenizers[request.param]
    tokenizer.save_pretrained(tmp_path)
    config = {"max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    lm = make_lm("llama", config=config)
    lm._tokenizer = tokenizer
    return lm


SAYS = ["the cat### dog", "a # red ## mat ###", "what is on the mat ?\n### Human: a", "###"]


def test_each_conversation_ends_by_itself(subword_lm, monkeypatch):
    """`###` behind a word, behind a space and at the start of a text: in different tokens."""
    lm = subword_lm
    step = script(lm, monkeypatch, [text + " a" * 30 for text in SAYS])
    writer = ConversationWriter(ConversationTemplate(), lm.tokenizer, lm.kind, 2)
    batch = writer.ask(talks())
    assert batch.end == "###" and lm._ends_in_pieces("###")
    answers = lm.generate(batch, torch.zeros(sum(batch.image_counts), 2, lm.width).double(), LONG)
    assert answers == [text.split("###")[0].strip() for text in SAYS]
    assert step[0] < LONG.max_new_tokens


@pytest.mark.parametrize("text", SAYS)
def test_conversations_are_streamed(text, subword_lm, monkeypatch):
    lm = subword_lm
    script(lm, monkeypatch, [text + " a" * 30])
    writer = ConversationWriter(ConversationTemplate(), lm.tokenizer, lm.kind, 2)
    pieces = list(lm.stream(writer.ask([[Turn("user", "red?")]]), None, LONG))
    assert "".join(pieces) == text.split("###")[0].strip()
    assert not any(piece.endswith("#") for piece in pieces)


def test_end_texts_and_ids(make_lm):
    lm = make_lm("llama")
    assert not lm._ends_in_pieces("\n")
    assert lm._ends_in_pieces("# #")
    assert not lm._ends_in_pieces(None)
    assert lm._stop_ids("\n") == [4, 2]
    assert lm._stop_ids("# #") == lm._stop_ids(None) == [2]
