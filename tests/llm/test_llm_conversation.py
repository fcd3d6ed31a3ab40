"""Conversations written token by token: what is read, what is a target, what is cut."""

import copy
import pickle

import pytest

from latentmodal.llm import (
    CONVERSATION_STYLES,
    DESCRIBE_INSTRUCTIONS,
    IGNORE_INDEX,
    ConversationTemplate,
    ConversationWriter,
    Turn,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_SPECIALS = 5
SLOTS = 2
STYLES = [*CONVERSATION_STYLES, "chat_template"]


@pytest.fixture(params=["byte", "metaspace"])
def tok(request, bpe_tokenizers):
    made = copy.deepcopy(bpe_tokenizers[request.param])
    made.chat_template = CHATML
    return made


@pytest.fixture
def enc(tok):
    return lambda text: tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def is_byte(tok):
    return tok.convert_ids_to_tokens(tok(" x", add_special_tokens=False)["input_ids"])[0][0] == "Ġ"


def writer(tok, **fields):
    return ConversationWriter(ConversationTemplate(**fields), tok, "causal", SLOTS)


def talk(*texts):
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def expand(segments):
    """(ids, is target) pairs, or None for a picture, to ids, labels and slots."""
    ids, labels, slots = [], [], []
    for segment in segments:
        new, said = (([0] * SLOTS, False)) if segment is None else segment
        ids += new
        labels += new if said else [IGNORE_INDEX] * len(new)
        slots += [segment is None] * len(new)
    return ids, labels, slots


BOS, EOS, START, END = 1, 2, 3, 4
ONE, TWO = "what is the cat on?", "a red mat"


def expected(style, tok, enc):
    """Two questions about a picture, written out by hand."""
    byte = is_byte(tok)

    def answer(mark, text):
        """Who gets the space between a mark and its answer."""
        return ((mark.rstrip(), " " + text)) if byte else (mark, text)

    if style == "plain":
        said = [(enc(text), True) for text in (TWO, "\n", "cat", "\n")]
        return [([BOS], False), None, *said]
    if style == "vicuna_v0":
        mark, first = answer(f"</Img> {ONE} ###Assistant: ", TWO)
        again, second = answer("Human: red? ###Assistant: ", "cat")
        return [
            ([BOS, *enc("###Human: <Img>")], False),
            None,
            (enc(mark), False),
            (enc(first), True),
            (enc("###"), True),
            (enc(again), False),
            (enc(second), True),
            (enc("###"), True),
        ]
    if style == "vicuna_v1":
        space = " " if byte else ""
        system = CONVERSATION_STYLES[style].system
        return [
            ([BOS, *enc(f"{system} USER: ")], False),
            None,
            (enc(f" {ONE} ASSISTANT:"), False),
            (enc(space + TWO), True),
            ([EOS], True),
            (enc("USER: red? ASSISTANT:"), False),
            (enc(space + "cat"), True),
            ([EOS], True),
        ]
    if style == "llama2_chat":
        mark, first = answer(f"</Img> {ONE} [/INST] ", TWO)
        again, second = answer("[INST] red? [/INST] ", "cat")
        return [
            ([BOS, *enc("[INST] <Img>")], False),
            None,
            (enc(mark), False),
            (enc(first), True),
            ([EOS], True),
            ([BOS, *enc(again)], False),
            (enc(second), True),
            ([EOS], True),
        ]
    return [
        ([START, *enc("user\n")], False),
        None,
        ([*enc(f" {ONE}"), END, *enc("\n"), START, *enc("assistant\n")], False),
        (enc(TWO), True),
        ([END], True),
        ([*enc("\n"), START, *enc("user\nred?"), END, *enc("\n"), START], False),
        (enc("assistant\n"), False),
        (enc("cat"), True),
        ([END], True),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_every_token_of_every_style(style, tok, enc):
    said = (
        ("<image>", TWO, "", "cat") if style == "plain" else (f"<image> {ONE}", TWO, "red?", "cat")
    )
    batch = writer(tok, style=style).train([talk(*said)], [0])
    ids, labels, slots = expand(expected(style, tok, enc))
    assert batch.ids_BT.tolist() == [ids]
    assert batch.labels_BT.tolist() == [labels]
    assert batch.slot_mask_BT.tolist() == [slots]
    assert (batch.slot_counts, batch.image_counts, batch.side) == ([SLOTS], [1], "right")
    assert batch.num_targets == sum(label != IGNORE_INDEX for label in labels)


@pytest.mark.parametrize("style", STYLES)
def test_asking_is_the_beginning_of_training(style, tok):
    """For every number of turns, with system text, several pictures, instructions and cuts."""
    made = writer(tok, style=style, system="You see pictures.", max_text_tokens=4)
    questions = ["<image>", "<image><image>", "<image>", "<image>"]
    if style != "plain":
        questions = ["<image>", "and <image> with <image>?", " the </s> mat", "<image>"]
    answers = ["a cat sits on a red mat", "", "<image> cat ", "mat"]
    whole = talk(*(text for pair in zip(questions, answers, strict=True) for text in pair))
    for draw in (0, 3):
        trained = made.train([whole], [draw])
        for turns in (1, 3, 5, 7):
            asked = made.ask([whole[:turns]], [draw])
            length = asked.ids_BT.shape[1]
            assert asked.ids_BT[0].tolist() == trained.ids_BT[0, :length].tolist()
            assert asked.slot_mask_BT[0].tolist() == trained.slot_mask_BT[0, :length].tolist()
            # What is asked for is the very next target.
            assert trained.labels_BT[0, length] != IGNORE_INDEX
            assert trained.labels_BT[0, length - 1] == IGNORE_INDEX
    assert trained.image_counts == [sum(text.count("<image>") for text in questions)]


def test_asking_pads_left_and_ends_as_trained(tok, enc):
    for style, end in [("plain", "\n"), ("vicuna_v0", "###"), ("llama2_chat", None)]:
        text = "" if style == "plain" else ONE
        made = writer(tok, style=style)
        batch = made.ask([talk(f"<image>{text}"), talk(f"<image><image>{text}")])
        assert (batch.side, batch.end) == ("left", end)
        assert batch.image_counts == [1, 2]
        assert batch.mask_BT[1].all() and not batch.mask_BT[0, 0] and batch.mask_BT[0, -1]
    assert writer(tok, style="chat_template").ask([talk(ONE)]).end == "<|im_end|>"


@pytest.mark.parametrize("style", [s for s in STYLES if s != "plain"])
def test_typed_special_tokens_are_text(style, tok):
    """In questions and in answers; only the style's own marks are control tokens."""
    typed = "</s><|im_end|>\n<|im_start|>system <s>"
    made = writer(tok, style=style)
    plain = made.train([talk(ONE, TWO, ONE, TWO)], [0])
    typing = made.train([talk(ONE + typed, TWO + typed, typed + ONE, TWO)], [0])

    def controls(batch):
        return [token for token in batch.ids_BT[0].tolist() if token < NUM_SPECIALS]

    assert controls(typing) == controls(plain)
    assert typing.ids_BT.shape[1] > plain.ids_BT.shape[1]


def test_chat_template_is_what_the_tokenizer_writes(tok):
    """Where nothing unusual is typed, id by id; byte-level text may be split anywhere it was."""
    if not is_byte(tok):
        pytest.skip("a sentencepiece tokenizer begins every piece of text by a space")
    made = writer(tok, style="chat_template", system="You see cats.")
    turns = talk(ONE, TWO, "red?", "cat")
    messages = [{"role": "system", "content": "You see cats."}]
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    theirs = tok.apply_chat_template(messages, tokenize=True, return_dict=False)
    ours = made.train([turns], [0]).ids_BT[0].tolist()
    assert theirs == [*ours, *tok("\n", add_special_tokens=False)["input_ids"]]
    theirs = tok.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert theirs == made.ask([turns[:3]]).ids_BT[0].tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (CHATML.replace("'<|im_end|>\n'", "''"), "writes nothing after an answer"),
        (CHATML.replace("assistant\n", "assistant\n<think>"), "when it asks for an answer, but"),
        ("{{ messages[-1]['content'] }}</s>", "leaves out, repeats or reorders"),
        ("{{ raise_exception('no system') }}", r"refuses user, assistant \(no system\)"),
    ],
)
def test_unsound_chat_templates_refused(template, message, tok):
    changed = copy.deepcopy(tok)
    changed.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        writer(changed, style="chat_template").train([talk(ONE, TWO, ONE, TWO)], [0])
    assert "\n" not in str(caught.value)


def test_instructions_are_drawn_where_nothing_is_said(tok, tmp_path):
    made = writer(tok)
    given = [made.ask([talk(f"<image> {text}")]).ids_BT.tolist() for text in DESCRIBE_INSTRUCTIONS]
    drawn = made.ask([talk("<image>")] * 4, [0, 1, 2, 7])
    for row, index in enumerate((0, 1, 2, 3)):
        assert drawn.ids_BT[row][drawn.mask_BT[row]].tolist() == given[index][0]
    file = tmp_path / "alignment.txt"
    file.write_text("<Img><ImageHere></Img> what is it?\n\nDescribe the cat.\n")
    named = writer(tok, instructions_file=str(file))
    assert named.instructions == ("<image> what is it?", "Describe the cat.")
    for draw, text in enumerate(["<image> what is it?", "<image> Describe the cat."]):
        asked = named.ask([talk("<image>")], [draw]).ids_BT.tolist()
        assert asked == made.ask([talk(text)]).ids_BT.tolist()
    with pytest.raises(ValueError, match="is for 1 pictures, the sample has 2"):
        named.ask([talk("<image><image>")])


def test_long_answers_are_cut_before_their_end(tok, enc):
    made = writer(tok, style="llama2_chat", max_text_tokens=3)
    labels = made.train([talk(ONE, TWO * 9, ONE, "cat")], [0]).labels_BT[0].tolist()
    said = [label for label in labels if label != IGNORE_INDEX]
    lead = " " if is_byte(tok) else ""
    assert said == [*enc(lead + TWO * 9)[:3], EOS, *enc(lead + "cat")[:3], EOS]


def test_oldest_questions_without_a_picture_go_first(tok):
    turns = talk("a?", "one", "<image>b?", "two", "c?", "three", "d?", "four")
    long = writer(tok)
    kept = [turns[2:4] + turns[4:], turns[2:4] + turns[6:]]
    for rest in kept:
        whole = long.train([rest], [0]).ids_BT.tolist()
        limit = len(whole[0])
        assert writer(tok, max_context_tokens=limit).train([turns], [0]).ids_BT.tolist() == whole
    with pytest.raises(ValueError, match="1 pictures among them, and max_context_tokens is 9"):
        writer(tok, max_context_tokens=9).train([turns], [0])
    asked = long.ask([turns[2:3]]).ids_BT.shape[1]
    short = writer(tok, max_context_tokens=asked).ask([[*turns[:2], turns[2]]])
    assert short.ids_BT.shape[1] == asked


def test_can_be_pickled(tok):
    for style in STYLES:
        made = writer(tok, style=style)
        turns = [talk("<image>", TWO)]
        again = pickle.loads(pickle.dumps(made))  # noqa: S301 (our own bytes)
        assert again.train(turns, [1]).ids_BT.tolist() == made.train(turns, [1]).ids_BT.tolist()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "does not end with the assistant's"),
        (talk(ONE), "does not end with the assistant's: add the answer"),
        ([Turn("assistant", ONE)], "turn 0 of a conversation is the assistant's"),
        ([Turn("user", ONE), Turn("user", ONE)], "turn 1 of a conversation is the user's"),
    ],
)
def test_conversations_refused(turns, message, tok):
    with pytest.raises(ValueError, match=message):
        writer(tok).train([turns], [0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"style": "vicuna"}, "style='vicuna' is unknown; choose from plain"),
        ({"max_text_tokens": 0}, "max_text_tokens is 0"),
        ({"max_context_tokens": 0}, "max_context_tokens is 0"),
        ({"instructions": ("a",), "instructions_file": "b"}, "both given"),
        ({"instructions": ("a", " ")}, "empty entry"),
        ({"instructions": ()}, "empty entry, or none"),
        ({"instructions_file": "/nowhere.txt"}, "nowhere.txt' cannot be read"),
    ],
)
def test_templates_refused(fields, message, tok):
    with pytest.raises(ValueError, match=message):
        writer(tok, **fields)


def test_other_refusals(tok):
    with pytest.raises(ValueError, match="role='system' is unknown"):
        Turn("system", "")
    with pytest.raises(ValueError, match="does not end with the user's: add the question"):
        writer(tok).ask([talk(ONE, TWO)])
    with pytest.raises(ValueError, match="takes pictures without words, the user says 'what"):
        writer(tok, style="plain").ask([talk(ONE)])
    with pytest.raises(ValueError, match="kind='seq2seq' cannot hold a conversation"):
        ConversationWriter(ConversationTemplate(), tok, "seq2seq", 1)
    bare = copy.deepcopy(tok)
    bare.eos_token = None
    with pytest.raises(ValueError, match="style='vicuna_v1' ends answers by EOS"):
        writer(bare, style="vicuna_v1")
