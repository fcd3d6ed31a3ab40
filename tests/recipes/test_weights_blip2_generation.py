"""BLIP-2's second stage, with its language model, to LAVIS, transformers and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from blip2_weights import (
    IDS_BT,
    OPT,
    PIXELS_BCHW,
    VOCAB,
    Train,
    assert_same,
    give,
    lavis_of,
    refusal,
    same_epsilon,
    shaken,
    speaker,
)
from finished_runs import model_of
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.weights import convert, convert_run
from latentmodal.llm import CausalConfig, LoraConfig


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("spare", [True, False])
def test_transformers_says_what_a_generation_run_says(
    kind: str, spare: bool, tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_recipes / "tokenizer"  # of 20 tokens
    model = speaker(kind, tokenizer, **({} if spare else {"vocab_size": 20}))
    give(monkeypatch, model)
    lines = convert_run(tmp_path, tmp_path / "hf", "hf_blip2")
    assert lines[2] == "absent  nothing"
    theirs, report = Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_epsilon(theirs)
    image = theirs.config.image_token_index
    assert image == 20 and theirs.config.text_config.vocab_size == (VOCAB if spare else 21)
    with torch.no_grad():
        soft_BME = model.read(PIXELS_BCHW)
        pixels = model.image_encoder.normalise(PIXELS_BCHW)
        ids = torch.cat([torch.full((2, 3), image), IDS_BT[1:].expand(2, -1)], dim=1)
        embeds = model.llm.model.get_input_embeddings()(ids[:, 3:])
        inputs = {"inputs_embeds": torch.cat([soft_BME, embeds], dim=1)}
        decoder = {} if kind == "opt" else {"decoder_input_ids": IDS_BT}
        expected = model.llm.model(**inputs, **decoder).logits
        found = theirs(pixels, ids, torch.ones_like(ids), **decoder).logits
        torch.testing.assert_close(found[..., :20], expected[..., :20], atol=1e-4, rtol=1e-4)
        said = theirs.generate(pixels, ids, max_new_tokens=4, do_sample=False)
        assert said.shape[0] == 2
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert reloaded.convert_tokens_to_ids("<image>") == image
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.num_query_tokens == 3


def test_a_generation_run_to_lavis_names_the_projection(
    tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("opt", "t5"):
        model = speaker(kind, tiny_recipes / "tokenizer")
        give(monkeypatch, model)
        convert_run(tmp_path, tmp_path / f"{kind}.pth", "lavis")
        state = lavis_of(tmp_path / f"{kind}.pth")
        assert torch.equal(state[f"{kind}_proj.weight"], model.bridge.proj.weight)
        assert not any("word_embeddings" in k or "intermediate.dense" in k for k in state)
        assert not any(k.startswith((f"{kind}_model.", "visual_encoder.")) for k in state)
    options = Options(heads=2)
    convert(tmp_path / "opt.pth", tmp_path / "o", "latentmodal", form="lavis", options=options)
    message = refusal(tmp_path / "o", tmp_path / "b.pth", "lavis", form="latentmodal")
    assert "give --projection opt_proj" in message
    projection = Options(projection="opt_proj")
    convert(tmp_path / "o", tmp_path / "b.pth", "lavis", form="latentmodal", options=projection)
    assert_same(lavis_of(tmp_path / "b.pth"), lavis_of(tmp_path / "opt.pth"))


def test_a_second_stage_of_lavis_beside_its_language_model(
    tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speaker("opt", tiny_recipes / "tokenizer")
    give(monkeypatch, model)
    convert_run(tmp_path, tmp_path / "s2.pth", "lavis", Options(with_vision=True))
    known: dict[str, Any] = {"heads": 2, "vision_heads": 2}
    source, hf = tmp_path / "s2.pth", "hf_blip2"
    assert "give --llm, its name or folder" in refusal(
        source, tmp_path / "no", hf, form="lavis", **known
    )
    assert "nowhere: its configuration cannot be read" in refusal(
        source, tmp_path / "no", hf, form="lavis", **known, llm=str(tmp_path / "nowhere")
    )
    model.llm.model.save_pretrained(tmp_path / "opt")
    options = Options(**known, llm=str(tmp_path / "opt"))
    convert(source, tmp_path / "hf", hf, form="lavis", options=options)
    theirs, report = Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(dict(theirs.language_model.state_dict()), dict(model.llm.model.state_dict()))
    # A configuration alone leaves the language model's weights absent, and says so.
    OPTConfig(**OPT).save_pretrained(tmp_path / "config")
    options = Options(**known, llm=str(tmp_path / "config"))
    lines = convert(source, tmp_path / "bare", hf, form="lavis", options=options)
    assert "language_model.* (" in lines[2]


def test_a_run_of_the_second_stage(
    aligned: Train, trained: Train, tiny_recipes: Path, tmp_path: Path
) -> None:
    first, folder = aligned(), tiny_recipes / "opt"
    shaken(OPTForCausalLM(OPTConfig(**OPT))).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_recipes / "tokenizer").save_pretrained(folder)
    text = (tiny_recipes / "alignment.yaml").read_text()
    text = text.replace("name: alignment", "name: generation")
    text = text.replace("  embed_dim: 8\n", f"  llm: {{name: causal, model: {folder}}}\n")
    text = text.replace("frozen}", 'frozen, "llm.*": frozen}')
    kept = [line for line in text.splitlines() if not line.startswith("  tokenizer:")]
    (tiny_recipes / "generation.yaml").write_text("\n".join(kept))
    run = trained("generation", f"system.pretrained={{path: {first}}}")
    convert_run(run, tmp_path / "a.pth", "lavis")
    lines = convert_run(run, tmp_path / "hf", "hf_blip2")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    bridge = model_of(run).bridge
    assert torch.equal(theirs.language_projection.weight, bridge.proj.weight)
    assert torch.equal(lavis_of(tmp_path / "a.pth")["query_tokens"], bridge.queries)
    assert lines[2] == "absent  nothing"


def test_text_that_ends_answers_is_told_to_transformers(
    tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, speaker("opt", tiny_recipes / "tokenizer"), end="-")
    convert_run(tmp_path, tmp_path / "hf", "hf_blip2")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert theirs.language_model.generation_config.eos_token_id == 2  # "-" is the third token


def test_a_language_model_that_trained(
    tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speaker("opt", tiny_recipes / "tokenizer")
    model.llm.requires_grad_(True)
    give(monkeypatch, model)
    convert_run(tmp_path, tmp_path / "a.pth", "lavis")
    convert_run(tmp_path, tmp_path / "ours", "latentmodal")
    own = dict(model.llm.model.state_dict())
    found = {k: v for k, v in lavis_of(tmp_path / "a.pth").items() if k.startswith("opt_model.")}
    assert_same({k.removeprefix("opt_model."): v for k, v in found.items()}, own)
    # What a recipe names as `model` of its language model.
    again = CausalConfig(model=str(tmp_path / "ours" / "llm")).build()
    assert_same(dict(again.model.state_dict()), own)
    assert len(again.tokenizer) == 20


def test_adapters_are_refused(
    tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    config = {"model_type": "opt", **OPT}
    lm = CausalConfig(
        config=config, tokenizer=str(tiny_recipes / "tokenizer"), lora=LoraConfig(rank=2)
    )
    model = speaker("opt", tiny_recipes / "tokenizer")
    model.llm = lm.build()
    give(monkeypatch, model)
    for to, target in (("hf_blip2", "out"), ("lavis", "out.pth")):
        assert "LoRA adapters" in refusal(tmp_path, tmp_path / target, to)
