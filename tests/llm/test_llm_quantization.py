"""Language models held in 8 or 4 bits, where bitsandbytes is installed."""

import importlib.util

import pytest
import torch

from latentmodal.llm import CausalConfig, GenerationSettings, PromptTemplate, PromptWriter

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BITS = ["int8", "int4"]


@pytest.fixture
def folder(make_lm, tokenizer, tmp_path):
    """Wide enough for blocks of 64 weights."""
    config = {"hidden_size": 64, "intermediate_size": 128}
    make_lm("llama", config=config).model.float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_quantised_model_says_and_passes_gradients(bits, folder):
    whole = CausalConfig(model=str(folder)).build().requires_grad_(False).eval()
    lm = CausalConfig(model=str(folder), quantization=bits).build().requires_grad_(False).eval()
    layer = lm.model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == {"int8": torch.int8, "int4": torch.uint8}[bits]
    assert lm.model.get_output_embeddings().weight.is_floating_point()

    writer = PromptWriter(
        PromptTemplate(text="{image}{bos}{answer}{eos}"), lm.tokenizer, "causal", 2
    )
    batch = writer.train([{"answer": "the cat sits"}, {"answer": "dog"}], [0, 0])
    torch.manual_seed(0)
    soft = torch.randn(2, 2, lm.width)
    gradients, losses = [], []
    for model in (whole, lm):
        tokens = soft.clone().requires_grad_()
        loss = model(batch, tokens)
        loss.backward()
        losses.append(loss.item())
        gradients.append(tokens.grad.flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > {"int8": 0.98, "int4": 0.8}[bits]

    settings = GenerationSettings(num_beams=1, max_new_tokens=5)
    asked = writer.ask([{}])
    assert (
        "".join(lm.stream(asked, soft[:1], settings)) == lm.generate(asked, soft[:1], settings)[0]
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_absent_packages_are_one_line(bits, package, folder, monkeypatch):
    found = {"bitsandbytes": True, "accelerate": True, package: None}
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: found[name] if name in found else real(name, *a),
    )
    with pytest.raises(ValueError, match=f"needs the package {package}: run `pip") as caught:
        CausalConfig(model=str(folder), quantization=bits).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": "x", "quantization": "int2"},
            "quantization='int2' is unknown; choose from none",
        ),
        ({"model": "x", "quantization": "int8", "random_init": True}, "these are random"),
        ({"config": {"model_type": "llama"}, "quantization": "int4"}, "these are random"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**fields)
