"""BLIP-2 between runs, LAVIS, transformers and folders: same outputs, exact ways back, refusals."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from latentmodal.bridges import AlignmentHead, QFormer, load
from latentmodal.encoders import TimmImageConfig
from latentmodal.experiments import weights
from latentmodal.experiments.cli import app
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.run import load_system
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.systems.generation import GenerationConfig
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.experiments.weights import convert, convert_run
from latentmodal.llm import CausalConfig, LoraConfig, PromptTemplate, Seq2SeqConfig

State = dict[str, Tensor]
Train = Callable[..., Path]

PIXELS_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS_BT = torch.tensor([[4, 19, 0, 0, 0, 0], [5, 6, 7, 8, 9, 19]])
VOCAB = 40

EVA: dict[str, Any] = {
    "model": "eva_giant_patch14_clip_224", "image_size": 32, "features": "penultimate",
    "resize": "squash",
    "model_kwargs": {
        "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2
    },
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "num_queries": 3, "width": 16, "layers": 3, "heads": 2, "mlp_dim": 24, "dropout": 0.0,
    "max_positions": 12,
}  # fmt: skip
TUNED = 'freeze={"image_encoder.*": 1.0}'
CNN = (
    "system.image_encoder={model: test_resnet, image_size: null, features: last, resize: null, "
    "weights: null, model_kwargs: null}"
)
OPT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 20, "num_hidden_layers": 1, "ffn_dim": 8, "dropout": 0.0,
    "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 20,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 19,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 20, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def model_of(run: Path) -> Any:
    return load_system(RunFolder(run), RunFolder(run).checkpoint())[0].model


def speaker(kind: str, tokenizer: Path | None = None, seed: int = 0, **llm: Any) -> Any:
    """A generation model of random weights, both ends frozen."""
    torch.manual_seed(seed)
    fields = OPT if kind == "opt" else T5
    config = {"model_type": kind, **fields, **llm}
    language = CausalConfig if kind == "opt" else Seq2SeqConfig
    model = GenerationConfig(
        image_encoder=TimmImageConfig(**EVA),
        bridge=BRIDGE_CHOICES["qformer"](**QFORMER),
        llm=language(config=config, tokenizer=str(tokenizer)),
    ).build_model()
    FreezePlan({"image_encoder.*": "frozen", "llm.*": "frozen"}).apply(model)
    return shaken(model)


def shaken(model: Any) -> Any:
    """No weight zero or one, which would hide one that was forgotten."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def blip2(kind: Any, folder: Path, text: Any = None) -> Any:
    """A class of transformers' with random weights, saved as the hub lays it out."""
    torch.manual_seed(3)
    config = Blip2Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 24, "vocab_size": 21, "max_position_embeddings": 12,
            "use_qformer_text_input": kind is Blip2ForImageTextRetrieval,
        },
        text_config=text or {"model_type": "opt", **OPT},
        num_query_tokens=3,
        image_text_hidden_size=8,
    )  # fmt: skip
    model = shaken(kind(config))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):  # EVA has no key bias
            parameter.data[32:64] = 0
    model.save_pretrained(folder)
    return model


def give(monkeypatch: pytest.MonkeyPatch, model: nn.Module, end: str | None = None) -> None:
    """Make `model` what any run holds."""
    config = SimpleNamespace(prompt=PromptTemplate(end=end))
    system = SimpleNamespace(model=model, config=config)
    monkeypatch.setattr(weights, "_load", lambda source: system)


def lavis_of(file: Path) -> State:
    content = torch.load(file, weights_only=True)
    assert list(content) == ["model"]
    state: State = content["model"]
    return state


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refusal(*arguments: Any, **options: Any) -> str:
    source, target, to = arguments
    form = options.pop("form", "run")
    with pytest.raises(UserError) as caught:
        convert(source, target, to, form=form, options=Options(**options))
    assert "\n" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def same_epsilon(theirs: Any) -> Any:
    """LAVIS and ours have 1e-5 here, transformers 1e-6."""
    theirs.vision_model.post_layernorm.eps = 1e-5
    return theirs.eval()


@torch.no_grad()
def test_transformers_loads_an_alignment_run(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    lines = convert_run(run, tmp_path / "hf", "hf_blip2")
    assert "head.temperature" in lines[1] and "bridge.caption_head" in lines[1]
    assert lines[2] == "absent  nothing"
    theirs, report = Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_epsilon(theirs)
    ours = model_of(run)
    pixels, mask = ours.image_encoder.normalise(PIXELS_BCHW), IDS_BT != 0
    similarity, verdict = (
        theirs(pixels, IDS_BT, mask.long(), use_image_text_matching_head=head).logits_per_image
        for head in (False, True)
    )
    features, image_BME = ours.encode_image(PIXELS_BCHW)
    text_BE = ours.encode_text(IDS_BT, mask)
    our_similarity = (image_BME @ text_BE.T).amax(dim=1)
    torch.testing.assert_close(our_similarity, similarity, atol=1e-5, rtol=1e-4)
    judged = ours.match(features, IDS_BT, mask)
    torch.testing.assert_close(judged, verdict[:, 1], atol=1e-5, rtol=1e-4)

    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32} and "crop_size" not in processor


def test_an_alignment_run_to_lavis_and_back(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    convert_run(run, tmp_path / "a.pth", "lavis")
    state = lavis_of(tmp_path / "a.pth")
    assert state["temp"].shape == ()
    assert not any(name.startswith("visual_encoder.") for name in state)
    assert torch.equal(
        state["Qformer.bert.embeddings.word_embeddings.weight"],
        state["Qformer.cls.predictions.decoder.weight"],
    )
    for form, way in (("latentmodal", tmp_path / "ours"), ("lavis", tmp_path / "b.pth")):
        source, back = (tmp_path / "a.pth", "lavis") if form == "latentmodal" else (
            tmp_path / "ours", "latentmodal"
        )  # fmt: skip
        convert(source, way, form, form=back, options=Options(heads=2 if back == "lavis" else None))
    assert_same(lavis_of(tmp_path / "b.pth"), state)

    ours = model_of(run)
    bridge, head = load(tmp_path / "ours"), load(tmp_path / "ours" / "head")
    assert isinstance(bridge, QFormer) and isinstance(head, AlignmentHead)
    assert bridge.config.heads == 2
    for module, own in ((bridge, ours.bridge), (head, ours.head)):
        assert_same(dict(module.state_dict()), dict(own.state_dict()))


def test_the_tower_goes_along_when_it_trained_or_is_asked_for(
    aligned: Train, tmp_path: Path
) -> None:
    convert_run(aligned(TUNED), tmp_path / "tuned.pth", "lavis")
    convert_run(aligned(), tmp_path / "asked.pth", "lavis", Options(with_vision=True))
    for file in ("tuned.pth", "asked.pth"):
        state = lavis_of(tmp_path / file)
        assert state["visual_encoder.blocks.1.attn.q_bias"].shape == (32,)
    source, options = tmp_path / "tuned.pth", Options(heads=2, vision_heads=2)
    convert(source, tmp_path / "ours", "latentmodal", form="lavis", options=options)
    convert(tmp_path / "ours", tmp_path / "again.pth", "lavis", form="latentmodal")
    assert_same(lavis_of(tmp_path / "again.pth"), lavis_of(source))
    # Its tower is one a recipe's `weights` can name.
    TimmImageConfig(**EVA, weights=str(tmp_path / "ours" / "image_encoder")).build()
    convert(source, tmp_path / "hf", "hf_blip2", form="lavis", options=options)
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf")
    assert torch.equal(
        loaded.vision_model.embeddings.class_embedding, lavis_of(source)["visual_encoder.cls_token"]
    )


def test_a_file_of_the_tower_beside_a_lavis_file(aligned: Train, tmp_path: Path) -> None:
    run = aligned()
    convert_run(run, tmp_path / "a.pth", "lavis")
    trunk = dict(model_of(run).image_encoder.trunk.state_dict())
    torch.save(trunk, tmp_path / "eva.pth")
    options: dict[str, Any] = {"heads": 2, "vision_heads": 2}
    assert "give --vision, the file of its EVA weights" in refusal(
        tmp_path / "a.pth", tmp_path / "no", "hf_blip2", form="lavis", **options
    )
    chosen = Options(**options, vision=str(tmp_path / "eva.pth"))
    convert(tmp_path / "a.pth", tmp_path / "one", "hf_blip2", form="lavis", options=chosen)
    convert_run(run, tmp_path / "two", "hf_blip2")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_same(first, second)
    # A whole EVA has a block and a norm that BLIP-2 does not read.
    trunk = {name: tensor.clone() for name, tensor in trunk.items()}
    whole = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    last = {k: v for k, v in trunk.items() if k.startswith("blocks.1.")}
    whole |= {k.replace("s.1.", "s.2."): v.clone() for k, v in last.items()}
    save_file({**trunk, **whole}, tmp_path / "whole.safetensors")
    chosen = Options(**options, vision=str(tmp_path / "whole.safetensors"))
    lines = convert(tmp_path / "a.pth", tmp_path / "3", "hf_blip2", form="lavis", options=chosen)
    assert "blocks.2." in lines[1] or "norm.weight" in lines[1]
    assert_same(load_file(tmp_path / "3" / "model.safetensors"), second)


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


@pytest.mark.parametrize("to", ["lavis", "hf_blip2", "latentmodal"])
def test_a_full_disk_is_one_line(
    aligned: Train, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = aligned()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("torch.save", "latentmodal.experiments.exports.blip2_hf.save_file"):
        monkeypatch.setattr(place, full)
    monkeypatch.setattr("latentmodal.bridges.component.save_file", full)
    target = tmp_path / ("out.pth" if to == "lavis" else "out")
    with pytest.raises(UserError, match=r"No space left on device.*; free space or choose another"):
        convert_run(run, target, to)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("text", ["opt", "t5", None])
def test_transformers_to_ours_and_back(text: str | None, tmp_path: Path) -> None:
    if text is None:
        blip2(Blip2ForImageTextRetrieval, tmp_path / "hf")
    else:
        fields = {"model_type": text, **(OPT if text == "opt" else T5)}
        blip2(Blip2ForConditionalGeneration, tmp_path / "hf", fields)
    lines = convert(tmp_path / "hf", tmp_path / "ours", "latentmodal", form="hf_blip2")
    convert(tmp_path / "ours", tmp_path / "back", "hf_blip2", form="latentmodal")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), state)
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")
    )
    for part in ("vision_config", "qformer_config"):
        for key in ("num_attention_heads", "hidden_size", "layer_norm_eps"):
            assert before[part][key] == after[part][key]
    if text is None:
        assert "head.temperature" in lines[2]
        assert load(tmp_path / "ours" / "head").state_dict()["temperature"].item() == (
            pytest.approx(0.07)
        )
        message = refusal(tmp_path / "ours", tmp_path / "a.pth", "lavis", form="latentmodal")
        assert "LAVIS" in message and "caption_head" in message
        return
    assert f"llm {sum(k.startswith('language_model.') for k in state)}" in lines[0]
    convert(tmp_path / "hf", tmp_path / "a.pth", "lavis", form="hf_blip2")
    assert f"{text}_proj.weight" in lavis_of(tmp_path / "a.pth")
    assert "visual_encoder.cls_token" in lavis_of(tmp_path / "a.pth")


def test_a_folder_in_shards(tmp_path: Path) -> None:
    model = blip2(Blip2Model, tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert index.is_file()
    for name in ("hf", "shards"):
        convert(tmp_path / name, tmp_path / f"{name}.pth", "lavis", form="hf_blip2")
    assert_same(lavis_of(tmp_path / "hf.pth"), lavis_of(tmp_path / "shards.pth"))
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../hf/model.safetensors"
    index.write_text(json.dumps(content))
    message = refusal(tmp_path / "shards", tmp_path / "no", "latentmodal", form="hf_blip2")
    assert "names '../hf/model.safetensors', which is no file of its folder" in message


class Bomb:
    """Pickles into a call that would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("content", ["namespace", "bomb"])
def test_pickled_objects_are_refused(aligned: Train, tmp_path: Path, content: str) -> None:
    convert_run(aligned(), tmp_path / "a.pth", "lavis")
    file, mark = tmp_path / "bad.pth", tmp_path / "executed"
    thing = argparse.Namespace(lr=1) if content == "namespace" else Bomb(mark)
    torch.save({"model": lavis_of(tmp_path / "a.pth"), "config": thing}, file)
    message = refusal(file, tmp_path / "out", "latentmodal", form="lavis", heads=2)
    assert f"{file} is refused: it would run" in message
    assert content == "bomb" or "argparse.Namespace" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    ("overrides", "to", "reason"),
    [
        (
            (CNN, TUNED),
            "hf_blip2",
            "no place for this image tower: it is timm's ResNet, not its Eva",
        ),
        (("system.bridge.input_norm=false",), "hf_blip2", "post_layernorm.weight"),
        (("system.bridge.num_input_positions=17",), "lavis", "bridge.input_positions has no place"),
        (("system.objectives.itg=0",), "lavis", "bridge.caption_head"),
        (("system.objectives.itm=0",), "hf_blip2", "head.itm_head"),
        ((), "hf_clip", "holds no pair of image and text tower; only those convert to hf_clip"),
    ],
)
def test_a_run_that_has_no_place_there(
    aligned: Train, tmp_path: Path, overrides: tuple[str, ...], to: str, reason: str
) -> None:
    target = tmp_path / ("out.pth" if to == "lavis" else "out")
    assert reason in refusal(aligned(*overrides), target, to)


def test_what_is_refused_before_anything_is_read(
    aligned: Train, trained: Train, tmp_path: Path
) -> None:
    run, out = aligned(), tmp_path / "out"
    assert "end its name in .pth" in refusal(run, out, "lavis")
    assert "give a folder to write" in refusal(run, tmp_path / "out.pth", "hf_blip2")
    assert "did you mean 'lavis'?" in refusal(run, out, "latentmodal", form="lavi")
    assert "lavis converts to lavis, hf_blip2, latentm" in refusal(
        run, out, "hf_clip", form="lavis"
    )
    assert "that is a copy" in refusal(run, out, "latentmodal", form="latentmodal")
    assert "no such file or folder" in refusal(tmp_path / "x", out, "latentmodal", form="lavis")
    assert "holds two towers" in refusal(trained("clip"), tmp_path / "out.pth", "lavis")
    assert "not a 'blip-2'" in _foreign(tmp_path, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(UserError, match="holds files already; give a new folder"):
        convert_run(run, tmp_path / "full", "hf_blip2")


def _foreign(tmp_path: Path, out: Path) -> str:
    OPTForCausalLM(OPTConfig(**OPT)).save_pretrained(tmp_path / "opt")
    return refusal(tmp_path / "opt", out, "latentmodal", form="hf_blip2")


def test_heads_that_shapes_do_not_show(aligned: Train, tmp_path: Path) -> None:
    convert_run(aligned(), tmp_path / "a.pth", "lavis")
    message = refusal(tmp_path / "a.pth", tmp_path / "out", "latentmodal", form="lavis")
    assert "width 16 does not divide into heads of 64; give --heads" in message
    damaged = lavis_of(tmp_path / "a.pth")
    damaged = {k: v for k, v in damaged.items() if ".layer.1." not in k}
    torch.save({"model": damaged}, tmp_path / "b.pth")
    message = refusal(tmp_path / "b.pth", tmp_path / "out", "latentmodal", form="lavis", heads=2)
    assert " more" in message and len(message) < 600


def test_the_command_line(aligned: Train, tmp_path: Path, latentmodal: Any) -> None:
    arguments = ["convert", str(aligned()), str(tmp_path / "a.pth"), "--to", "lavis"]
    done = CliRunner().invoke(app, [*arguments, "--with-vision"])
    assert done.exit_code == 0, done.output
    groups = [line.split()[0] for line in done.output.splitlines()]
    assert groups[-4:] == ["taken", "unused", "absent", "wrote"]
    arguments = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--from", "lavis"]
    chosen = ["--to", "hf_blip2", "--heads", "2", "--vision-heads", "2"]
    assert CliRunner().invoke(app, [*arguments, *chosen]).exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()

    refused = latentmodal(*arguments[:2], tmp_path / "o", "--from", "lavis", "--to", "latentmodal")
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "give --heads" in last
    assert "Traceback" not in refused.stderr
