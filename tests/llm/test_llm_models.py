"""Language models: where they come from, what they read, what they say, and what of them trains."""

import copy

import pytest
import torch

from latentmodal.llm import (
    CausalConfig,
    GenerationSettings,
    LoraConfig,
    PromptTemplate,
    PromptWriter,
    Seq2SeqConfig,
)

M, EOS = 3, 2
NAMES = ("opt", "llama", "t5")
ASKING = PromptTemplate(text="{image}{bos}{question}{answer}{eos}")
FIELDS = [
    {"question": "what is it ?", "answer": "the red cat"},
    {"question": "red", "answer": "dog"},
    {"question": "what is on the mat", "answer": "a big dog sits on it"},
]


def writer(lm, template=ASKING):
    return PromptWriter(template, lm.tokenizer, lm.kind, M)


def soft_tokens(lm, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, M, lm.width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_the_mean_over_all_answer_tokens(make_lm, name):
    """Padding changes nothing: a batch's loss is that of its samples, weighed by their tokens."""
    lm = make_lm(name)
    soft = soft_tokens(lm)
    batch = writer(lm).train(FIELDS, [0] * 3)
    singles = [writer(lm).train([f], [0]) for f in FIELDS]
    losses = [lm(one, soft[i : i + 1]) * one.num_targets for i, one in enumerate(singles)]
    assert batch.num_targets == sum(one.num_targets for one in singles) == 4 + 2 + 7
    torch.testing.assert_close(lm(batch, soft), sum(losses) / batch.num_targets)
    shared = lm(batch, soft, denominator=torch.tensor(26.0))
    torch.testing.assert_close(shared, lm(batch, soft) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_head_sees_only_what_predicts_an_answer(make_lm, name):
    lm = make_lm(name)
    batch = writer(lm).train(FIELDS, [0] * 3)
    rows = []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, x, y: rows.append(len(x[0])))
    lm(batch, soft_tokens(lm)).backward()
    assert rows == [batch.num_targets]


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_left_padded_batch_equals_singles(make_lm, name):
    lm = make_lm(name)
    soft = soft_tokens(lm)
    batch = writer(lm).ask(FIELDS)
    hidden_BTD = lm.hidden_states(batch, lm.embed(batch, soft))
    for i, fields in enumerate(FIELDS):
        one = writer(lm).ask([fields])
        alone_TD = lm.hidden_states(one, lm.embed(one, soft[i : i + 1]))[0]
        torch.testing.assert_close(hidden_BTD[i, -len(alone_TD) :], alone_TD)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("end", [None, "\n", "sits #"])
@pytest.mark.parametrize("name", NAMES)
def test_batched_generation_equals_one_by_one(make_lm, name, end, beams):
    lm = make_lm(name, seed=3)
    settings = GenerationSettings(
        num_beams=beams, max_new_tokens=12, min_new_tokens=2, repetition_penalty=1.3
    )
    template = PromptTemplate(text=ASKING.text, end=end)
    soft = soft_tokens(lm)
    batched = lm.generate(writer(lm, template).ask(FIELDS), soft, settings)
    for i, fields in enumerate(FIELDS):
        asked = writer(lm, template).ask([fields])
        assert [batched[i]] == lm.generate(asked, soft[i : i + 1], settings)
    assert any(batched)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("end", ["\n", "cat #"])
def test_each_answer_ends_by_itself(make_lm, end, beams):
    """One token or several: the answer ends there, in its own row, and the end is not part of it.

    The head is replaced by a table: after the last prompt token comes the next of a fixed sequence,
    chosen by what each row was asked.
    """
    lm = make_lm("llama")
    tokenizer = lm.tokenizer
    says = {"red": "big cat # dog\nruns", "blue": "small dog sits on the mat"}
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in says.values()]

    def scripted(module, args, kwargs, output):
        step = scripted.step
        scripted.step += 1
        logits = torch.full_like(output.logits, -50.0)
        per_row = logits.shape[0] // len(rows)
        for row in range(logits.shape[0]):
            script = rows[row // per_row]
            logits[row, -1, script[step] if step < len(script) else 2] = 0.0
        output.logits = logits
        return output

    scripted.step = 0
    lm.model.register_forward_hook(scripted, with_kwargs=True)
    asked = writer(lm, PromptTemplate(text=ASKING.text, end=end)).ask(
        [{"question": word} for word in says]
    )
    settings = GenerationSettings(num_beams=beams, max_new_tokens=10)
    told = lm.generate(asked, soft_tokens(lm, 2), settings)
    first = {"\n": "big cat # dog", "cat #": "big"}[end]
    assert told == [first, "small dog sits on the mat"]
    stopped = scripted.step
    assert stopped <= 8  # not until max_new_tokens


def test_lengths_and_sampling(make_lm):
    lm = make_lm("llama")
    asked, soft = writer(lm).ask(FIELDS), soft_tokens(lm)
    lm.model.get_output_embeddings().weight.data[:4] = 0.0
    lm.model.get_output_embeddings().weight.data[EOS] = soft.new_tensor([9.0, -9.0] * 8)
    for least, most in ((6, 6), (3, 9)):
        settings = GenerationSettings(num_beams=2, min_new_tokens=least, max_new_tokens=most)
        tokens = [len(text.split(" ")) for text in lm.generate(asked, soft, settings)]
        assert all(least <= number <= most for number in tokens), tokens
    drawn = GenerationSettings(num_beams=1, do_sample=True, top_p=1.0, max_new_tokens=8)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(lm.generate(asked, soft, drawn))
    assert texts[0] == texts[1] != texts[2]


def test_checkpoint_sampling_defaults_do_not_leak(make_lm, tmp_path, tokenizer):
    """What generation_config.json of a checkpoint says must not change ours."""
    lm = make_lm("llama")
    lm.model.generation_config.no_repeat_ngram_size = 1
    lm.model.generation_config.suppress_tokens = [10]
    lm.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = CausalConfig(model=str(tmp_path)).build().double().eval()
    assert again.model.generation_config.no_repeat_ngram_size is None
    settings = GenerationSettings(num_beams=1, max_new_tokens=12)
    asked, soft = writer(lm).ask(FIELDS), soft_tokens(lm)
    ours = make_lm("llama").generate(asked, soft, settings)
    assert again.generate(asked, soft, settings) == ours


def test_training_batch_cannot_be_asked(make_lm):
    lm = make_lm("llama")
    with pytest.raises(ValueError, match=r"make it with PromptWriter\.ask"):
        lm.generate(writer(lm).train(FIELDS, [0] * 3), soft_tokens(lm), GenerationSettings())


@pytest.mark.parametrize("name", NAMES)
def test_text_only_and_bridge_kept_in_graph(make_lm, name):
    lm = make_lm(name)
    batch = writer(lm, PromptTemplate(text="{bos}{answer}{eos}")).train(FIELDS, [0] * 3)
    bridge = torch.nn.Linear(4, lm.width, dtype=torch.float64)
    soft = bridge(torch.ones(1, M, 4, dtype=torch.float64))[:0]
    loss = lm(batch, soft)
    loss.backward()
    assert bridge.weight.grad is not None and not bridge.weight.grad.any()
    torch.testing.assert_close(lm(batch, None), loss)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_a_frozen_model_gives_the_same_gradient(make_lm, name):
    """Also in eval mode, where transformers' own switch does nothing."""
    lm, saving = make_lm(name), make_lm(name, grad_checkpointing=True)
    assert lm.state_dict().keys() == saving.state_dict().keys()
    batch = writer(lm).train(FIELDS, [0] * 3)
    grads = []
    for model in (lm, saving):
        model.requires_grad_(False)
        calls: list[int] = []
        for module in model.modules():
            if isinstance(module, model.fsdp_units):
                inner = next(module.children())
                inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        soft = soft_tokens(model).requires_grad_()
        model(batch, soft).backward()
        grads.append((soft.grad, len(calls)))
    torch.testing.assert_close(grads[1][0], grads[0][0])
    assert grads[1][1] == 2 * grads[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_forward_reads_nothing_back_from_the_device(make_lm, name, monkeypatch):
    """On the meta device any look at a value fails, as on a GPU it would wait.

    The body of a causal model is left out: transformers itself looks at Llama's position ids.
    """
    lm = make_lm(name)
    if name != "t5":
        monkeypatch.setattr(lm, "hidden_states", lambda batch, embeds_BTE: embeds_BTE)
    batch = writer(lm).train(FIELDS, [0] * 3)
    soft = soft_tokens(lm).to("meta").requires_grad_()
    denominator = torch.ones((), device="meta")
    loss = lm.to("meta")(batch.to("meta"), soft, denominator=denominator)
    loss.backward()
    assert loss.is_meta and loss.shape == () and soft.grad is not None


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_right_padding_needs_no_mask(make_lm, name):
    """No mask lets attention take its causal kernel; the parity tests show that it is exact."""
    lm = make_lm(name)
    asked: list[set[str]] = []
    body = lm.model.base_model
    body.register_forward_pre_hook(lambda m, a, kw: asked.append(set(kw)), with_kwargs=True)
    lm(writer(lm).train(FIELDS, [0] * 3), soft_tokens(lm))
    assert asked == [{"inputs_embeds", "use_cache"}]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_reads_float32_soft_tokens(make_lm, name):
    lm = make_lm(name).bfloat16()
    soft = soft_tokens(lm).float().requires_grad_()
    loss = lm(writer(lm).train(FIELDS, [0] * 3), soft)
    loss.backward()
    assert loss.dtype == torch.float32 and soft.grad.isfinite().all() and soft.grad.any()


def test_dtype_of_weights():
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    lm = CausalConfig(config=config, dtype="bfloat16").build()
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.training


@pytest.mark.parametrize("cls", [CausalConfig, Seq2SeqConfig])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_builds_on_the_meta_device(cls, lora):
    name = "llama" if cls is CausalConfig else "t5"
    with torch.device("meta"):
        lm = cls(config={"model_type": name, "vocab_size": 50}, lora=lora).build()
    assert all(p.is_meta for p in lm.parameters())
    assert lm.width in (4096, 512) and lm.fsdp_units
    with pytest.raises(ValueError, match="set tokenizer to a hub name or a folder"):
        _ = lm.tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_lora_trains_adapters_only(make_lm, name):
    lm = make_lm(name, lora=LoraConfig(rank=2, dropout=0.0))
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert all("lora_" not in n for n, p in lm.named_parameters() if not p.requires_grad)
    batch, soft = writer(lm).train(FIELDS, [0] * 3), soft_tokens(lm)
    before = lm(batch, soft)
    before.backward()
    assert {n for n, p in lm.named_parameters() if p.grad is not None} == trained
    other = make_lm(name, seed=7, lora=LoraConfig(rank=2, dropout=0.0))
    other.load_state_dict(lm.state_dict())
    torch.testing.assert_close(other(batch, soft), before)
    frozen = copy.deepcopy({n: p for n, p in lm.named_parameters() if n not in trained})
    torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=1.0).step()
    assert lm(batch, soft) < before
    for n, p in frozen.items():
        assert torch.equal(p, lm.get_parameter(n))


def test_lora_adapters_stay_float32():
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    lm = CausalConfig(config=config, dtype="bfloat16", lora=LoraConfig(rank=2)).build()
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    assert lm.model(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_loads_what_save_pretrained_wrote(make_lm, name, tmp_path, tokenizer):
    lm = make_lm(name)
    lm.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = type(lm.config)(model=str(tmp_path)).build().double().eval()
    batch, soft = writer(again).train(FIELDS, [0] * 3), soft_tokens(lm)
    torch.testing.assert_close(again(batch, soft), lm(batch, soft), rtol=1e-6, atol=1e-6)
    random = type(lm.config)(model=str(tmp_path), random_init=True).build().double().eval()
    assert not torch.allclose(random(batch, soft), lm(batch, soft))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of model"),
        ({"model": "a", "gguf": "b"}, "got model and gguf"),
        ({"config": {"hidden_size": 3}}, "no model_type"),
        ({"config": {"model_type": "llama"}, "dtype": "int8"}, "choose from float32"),
    ],
)
def test_config_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**fields)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (CausalConfig, {"config": {"model_type": "t5"}}, "use name: seq2seq"),
        (Seq2SeqConfig, {"config": {"model_type": "llama"}}, "use name: causal"),
        (Seq2SeqConfig, {"config": {"model_type": "bart"}}, "bart is not supported"),
        (CausalConfig, {"config": {"model_type": "vit"}}, "no causal language model"),
        (CausalConfig, {"config": {"model_type": "lama"}}, "'lama' is unknown"),
        (CausalConfig, {"config": {"model_type": "cohere"}}, "logit_scale"),
        (CausalConfig, {"config": {"model_type": "gemma2"}}, "final_logit_softcapping"),
        (CausalConfig, {"config": {"model_type": "bert"}}, "not of a body and a head"),
        (
            CausalConfig,
            {"config": {"model_type": "llama"}, "config_overrides": {"hiden_act": "gelu"}},
            "config_overrides: llama has no field 'hiden_act'",
        ),
    ],
)
def test_models_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        cls(**fields).build()


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_fields_of_a_models_own_configuration_change(kind, make_lm, tmp_path):
    """As BLIP-2 changes the activation of FlanT5; the weights are those of the folder."""
    name = {"t5": "dense_act_fn", "llama": "hidden_act"}[kind]
    lm = make_lm(kind)
    lm.model.save_pretrained(tmp_path)
    assert getattr(lm.model.config, name) != "gelu"
    changed = type(lm.config)(model=str(tmp_path), config_overrides={name: "gelu"}).build()
    activations = [m for m in changed.modules() if type(m).__name__.endswith("Activation")]
    assert activations and all(type(m).__name__ == "GELUActivation" for m in activations)
    plain = type(lm.config)(model=str(tmp_path)).build()
    before, after = plain.model.state_dict(), changed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_folders_and_names_refused(make_lm, tmp_path, monkeypatch, tokenizer):
    with pytest.raises(ValueError, match=r"folder without config\.json"):
        CausalConfig(model=str(tmp_path)).build()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a local folder nor a model the hub") as caught:
        CausalConfig(model="someone/no-such-model").build()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="train the run that writes the folder first"):
        CausalConfig(model="runs/lm-emoji/seed0/llm").build()

    lm = make_lm("llama")
    lm.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        _ = CausalConfig(model=str(tmp_path)).build().tokenizer
    with pytest.raises(ValueError, match="use name: causal"):
        Seq2SeqConfig(model=str(tmp_path)).build()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="28 tokens, the language model embeds 27"):
        _ = CausalConfig(model=str(tmp_path)).build().tokenizer


def test_incomplete_weights_refused(make_lm, tmp_path):
    lm = make_lm("llama")
    state = {k: v for k, v in lm.model.state_dict().items() if "layers.1.mlp" not in k}
    lm.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"has no weights for model\.layers\.1\.mlp"):
        CausalConfig(model=str(tmp_path)).build()


def test_lora_targets_refused(make_lm):
    with pytest.raises(ValueError, match=r"choose from .*q_proj") as caught:
        make_lm("llama", lora=LoraConfig(targets=("query",)))
    assert "\n" not in str(caught.value)
    for fields in ({"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="lora"):
            LoraConfig(**fields)
