"""A mistake in a recipe is one line that names the file, the key and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latentmodal.experiments import cli
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe, to_yaml

COMPLETE = """
name: mine
system:
  name: contrastive
  image_encoder: {name: timm, model: vit_tiny_patch16_224}
  text_encoder: {name: transformer, width: 64, depth: 1, heads: 1}
  tokenizer: {name: word, path: words.json}
  head: {embed_dim: 16}
data:
  train:
    - {name: shards, urls: a.tar}
    - {name: shards, urls: b.tar, weight: 3}
trainer: {max_steps: 5}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_recipe_the_mistakes_are_made_in_is_right(tmp_path: Path) -> None:
    recipe = load_recipe(str(write(tmp_path, COMPLETE)))
    assert [source.weight for source in recipe.data.train] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("right", "wrong", "key", "remedy"),
    [
        ("trainer:", "trainr:", "trainr", "did you mean 'trainer'?"),
        ("max_steps: 5", "max_step: 5", "trainer.max_step", "did you mean 'max_steps'?"),
        ("width: 64", "widht: 64", "system.text_encoder.widht", "did you mean 'width'?"),
        ("weight: 3", "wieght: 3", "data.train[1].wieght", "did you mean 'weight'?"),
        ("embed_dim: 16", "zzz: 16", "system.head.zzz", "choose from embed_dim, image_bias"),
        ("name: mine", "seed: 0", "name", "missing; give it a value"),
        ("max_steps: 5", "log_every: 5", "trainer.max_steps", "missing; give it a value"),
        ("trainer: {max_steps: 5}", "trainer:", "trainer", "missing; give it a value"),
        ("head: {embed_dim: 16}", "head: null", "system.head", "missing; give it a value"),
        ("name: timm, ", "", "system.image_encoder.name", "missing; choose from timm, tr"),
        ("name: timm", "name: tim", "system.image_encoder.name", "did you mean 'timm'?"),
        ("name: contrastive", "name: clip", "system.name", "choose from alignment, co"),
        ("name: shards, urls: b", "name: shard, urls: b", "data.train[1].name", "'shards'?"),
        ("max_steps: 5", "max_steps: five", "trainer.max_steps", "could not be converted to Int"),
        ("max_steps: 5", "max_steps: 0", "trainer", "max_steps is 0; it must be above 0"),
        ("embed_dim: 16", "embed_dim: [16]", "system.head.embed_dim", "converted to Integer"),
        ("head: {embed_dim: 16}", "head: 16", "system.head", "expected a mapping, got 16"),
        ("heads: 1", "heads: 3", "system.text_encoder", "multiple of heads"),
        ("name: mine", "name: mine\nseed: -1", "seed", "seed is -1; give 0 or more"),
        ("name: mine", "name: mine\nfreeze: {'a.*': 0}", "freeze", "'frozen' or a multiplier"),
        ("name: mine", "name: mine\nevaluation: {views: x}", "evaluation", "is no task"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, right: str, wrong: str, key: str, remedy: str) -> None:
    assert COMPLETE.count(right) >= 1
    path = write(tmp_path, COMPLETE.replace(right, wrong, 1))
    message = complaint(path)
    assert message.startswith(f"{path}: {key}")
    assert remedy in message


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (COMPLETE + "name: twice\n", 14, "found duplicate key name"),
        (COMPLETE.replace("depth: 1", "width: 1"), 6, "found duplicate key width"),
        ("name: mine\nsystem: [1, 2\ndata: 3\n", 3, "expected ',' or ']'"),
        ("name: mine\n\tseed: 1\n", 2, "found a tab character"),
    ],
)
def test_broken_yaml_is_located(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = write(tmp_path, text)
    message = complaint(path)
    assert message.startswith(f"{path}:{line}: ")
    assert reason in message


def test_a_recipe_that_is_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "- name: mine\n- seed: 1\n")
    assert complaint(path) == f"{path}: a recipe is a mapping of keys; this file holds a list"


def test_an_empty_recipe_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert complaint(path) == f"{path}: name: missing; give it a value"


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert complaint(path).startswith(str(path))


def test_recipe_not_found_names_the_nearest() -> None:
    assert complaint("clip/vit_b23") == (
        "recipe 'clip/vit_b23': no such file or shipped recipe; did you mean 'clip/vit_b32'?"
    )


def test_base_not_found(tmp_path: Path) -> None:
    path = write(tmp_path, "base: clip/emojy\nname: mine\n")
    message = complaint(path)
    assert message.startswith(f"{path}: base: ")
    assert "clip/emojy" in message and "did you mean 'clip/emoji'?" in message


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_bases_in_a_circle(tmp_path: Path, names: list[str]) -> None:
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        write(tmp_path, f"base: {base}.yaml\n", f"{name}.yaml")
    message = complaint(tmp_path / "a.yaml")
    assert message.startswith(f"{tmp_path / 'a.yaml'}: base: ")
    assert "circle" in message


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, COMPLETE.replace("max_steps", "max_step"), "base.yaml")
    child = write(tmp_path, "base: base.yaml\nname: child\ntrainer: {max_steps: 4}\n")
    assert complaint(child).startswith(f"{base}: trainer.max_step: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed': an override is key=value, for example seed=1"),
        ("=3", "'=3': an override is key=value, for example seed=1"),
        ("optim.lrr=1", "command line: optim.lrr: no such key; did you mean 'lr'?"),
        ("optim.lr=fast", "command line: optim.lr: Value 'fast' of type 'str'"),
        ("optim.lr={", "overrides optim.lr={: "),
        ("optim.lr=${nowhere}", "command line: optim.lr: Interpolation key 'nowhere' not found"),
        ("data.train=[]", "command line: data: train is empty; name at least one source"),
        ("data.train.0.wieght=2", "command line: data.train[0].wieght: no such key; did you"),
        ("data.train.2.weight=2", "command line: data.train.2: no such item; the list has 2"),
        ("data.train.x.weight=2", "command line: data.train: expected a list of components"),
        ("freeze.image_encoder.*=frozen", "command line: freeze: 'image_encoder' is "),
        ("trainer.devices=2", "command line: trainer: devices is 2 on 1 node(s)"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, override: str, message: str) -> None:
    assert complaint(write(tmp_path, COMPLETE), override).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "override", "key", "remedy"),
    [
        ("stage1_emoji", "system.objectives={itc: 0, itm: 0, itg: 0}", "system.objectives",
         "itc, itm and itg are all 0; leave one of them on"),
        ("stage1_emoji", "system.objectives.itg=-1", "system.objectives", "give 0 (off) or more"),
        ("stage1_emoji", "system.objectives.itx=1", "system.objectives.itx", "did you mean 'itm'?"),
        ("stage1_emoji", "system.bridge.name=linear", "system.bridge.name", "choose from qformer"),
        ("stage1_emoji", "system.bridge.in_dim=3", "system.bridge.in_dim", "no such key"),
        ("stage1_emoji", "system.bridge.heads=3", "system.bridge", "width=128 does not divide"),
        ("stage1_emoji", "system.bridge.num_queries=0", "system.bridge", "at least 1"),
        ("stage1_emoji", "system.image_encoder.name=runs", "system.image_encoder.name", "'run'?"),
        ("stage1_emoji", "system.image_encoder.path=null", "system.image_encoder.path", "missing"),
        ("stage1_emoji", "data.loader.match=key", "data.loader", "choose row, caption, image"),
        ("stage1_emoji", "data.loader.clean=lavis", "data.loader", "choose none or blip"),
        ("stage1_emoji", "data.loader.captions_per_image=2", "data.loader", "leave match at row"),
        ("stage1_emoji", "data.augment.scale=[0,1]", "data.augment", "0 < low <= high <= 1"),
        ("stage1_emoji", "evaluation.tasks.swapped_by_itm.by=itx",
         "evaluation.tasks.swapped_by_itm", "choose from similarity, itm, itg"),
        ("stage1_emoji", "evaluation.tasks.unseen_pairs_itm.top_k=0",
         "evaluation.tasks.unseen_pairs_itm", "top_k is 0; give 1 or more"),
        ("stage1_vitg", "system.pretrained.format=keras", "system.pretrained",
         "choose from run, latentmodal, lavis, hf, bert"),
        ("stage1_emoji", "data.loader={captions_per_image: 2, match: row}",
         "data.loader.captions_per_image", "is 2, and alignment reads one caption of each pict"),
        ("stage2_emoji", "system.prompt.text='{image}{question}{answer}'", "system",
         "has the field {question}, which target=caption does not fill (it fills answer)"),
        ("vqa_v2", "system.prompt.text='{image}{ask}{answer}'", "system",
         "has the field {ask}, which target=answer does not fill (it fills answer, question)"),
        ("stage2_emoji", "system.target=reply", "system", "choose from caption, description, answ"),
        ("stage2_emoji", "system.llm.model=x", "system.llm", "got model and gguf"),
        ("stage2_emoji", "system.llm.gguf=null", "system.llm", "got none"),
        ("stage2_emoji", "system.llm.dtype=int8", "system.llm.dtype", "expected one of"),
        ("stage2_emoji", "system.llm.lora={rank: 0}", "system.llm.lora", "must be at least 1"),
        ("stage2_emoji", "system.prompt.text='{image}{bos}'", "system.prompt", "write one"),
        ("stage2_emoji", "system.prompt.text='{answer} {bos}'", "system.prompt", "only {eos} may"),
        ("stage2_emoji", "system.generation.num_beams=0", "system.generation", "at least 1"),
        ("stage2_emoji", "evaluation.tasks.mine={name: vqa, scoring: best, source: {name: emoji}}",
         "evaluation.tasks.mine.scoring", "expected one of ['mmf', 'official', 'lavis', 'exact'"),
        ("caption_coco", "optim.layer_decay[image_encoder.*]=0", "optim", "above 0, at most 1"),
        ("caption_coco", "optim.warmup_start_lr=1", "optim", "must lie between 0 and lr 1e-05"),
    ],
)  # fmt: skip
def test_mistakes_in_blip2(recipe: str, override: str, key: str, remedy: str) -> None:
    message = complaint(f"blip2/{recipe}", override)
    assert message.startswith(f"command line: {key}: ")
    assert remedy in message


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("data.train.0.weight=2", lambda r: [s.weight for s in r.data.train], [2.0, 3.0]),
        ("data.train.1.urls=c.tar", lambda r: [s.urls for s in r.data.train], ["a.tar", "c.tar"]),
        (
            "data.train.1={name: emoji, split: train}",
            lambda r: [type(s).__name__ for s in r.data.train],
            ["ShardSourceConfig", "EmojiSourceConfig"],
        ),
        ("freeze[image_encoder.*]=frozen", lambda r: r.freeze, {"image_encoder.*": "frozen"}),
        ("optim.grad_clip=null", lambda r: r.optim.grad_clip, None),
        ("optim.lr=null", lambda r: r.optim.lr, 5e-4),
        ("optim.betas=[0.8,0.9]", lambda r: r.optim.betas, (0.8, 0.9)),
        (
            "system.text_encoder={name: transformers, model: some/bert}",
            lambda r: type(r.system.text_encoder).__name__,
            "HfTextConfig",
        ),
    ],
)
def test_overrides_reach_their_key(tmp_path: Path, override: str, read: Any, value: Any) -> None:
    assert read(load_recipe(str(write(tmp_path, COMPLETE)), [override])) == value


@pytest.mark.parametrize(
    ("new", "order"),
    [
        ("{'a.b.*': 0.5}", ["a.b.*", "a.*", "c.*"]),
        ("{'a.b.*': 0.5, 'c.*': 0.1}", ["a.b.*", "c.*", "a.*"]),
        ("{'c.*': 0.1}", ["c.*", "a.*"]),
    ],
)
def test_an_exception_to_the_bases_freeze_plan_stands_before_it(
    tmp_path: Path, new: str, order: list[str]
) -> None:
    """The first pattern that matches decides, so behind the base's it would never be reached."""
    write(tmp_path, COMPLETE + "freeze: {'a.*': frozen, 'c.*': 0.2}\n", "base.yaml")
    recipe = load_recipe(str(write(tmp_path, f"base: base.yaml\nfreeze: {new}\n")))
    assert list(recipe.freeze) == order
    again = load_recipe(str(write(tmp_path, to_yaml(recipe), "again.yaml")))
    assert list(again.freeze) == order


def test_naming_another_component_drops_the_old_keys(tmp_path: Path) -> None:
    write(tmp_path, COMPLETE, "base.yaml")
    bert = "{name: transformers, model: some/bert, pooling: mean}"
    child = write(tmp_path, f"base: base.yaml\nsystem: {{text_encoder: {bert}}}\n")
    recipe = load_recipe(str(child))
    assert recipe.system.text_encoder.pooling == "mean"
    assert recipe.system.image_encoder.model == "vit_tiny_patch16_224"


def test_one_line_and_exit_code_2(latentmodal: Any, tmp_path: Path) -> None:
    path = write(tmp_path, COMPLETE.replace("max_steps", "max_step"))
    done = latentmodal("fit", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr == f"error: {path}: trainer.max_step: no such key; did you mean 'max_steps'?\n"
    )


def test_debug_shows_the_traceback(latentmodal: Any) -> None:
    done = latentmodal("--debug", "recipe", "show", "clip/emojy")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "did you mean 'clip/emoji'?" in done.stderr


def test_show_prints_a_recipe_that_loads_again(tmp_path: Path) -> None:
    keys = ["data.train.0.weight=7", "seed=3"]
    result = CliRunner().invoke(cli.app, ["recipe", "show", "clip/vit_b32", *keys])
    assert result.exit_code == 0
    assert load_recipe(str(write(tmp_path, result.output))) == load_recipe("clip/vit_b32", keys)
