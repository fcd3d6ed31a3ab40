"""`latentmodal export --bridge`: a run's bridge as a folder that opens anywhere."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bridge_runs import BRIDGES, LLM_WIDTH, PATCHES, WIDTH, fit_bridge
from command_line import main
from finished_runs import model_of, sections
from latentmodal.bridges import Bridge, hub, load
from latentmodal.experiments.exports.bridge import CARD_FILE, FILES
from latentmodal.experiments.systems.pretrained import PretrainedConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path) -> Path:
    """A finished run of each bridge, and its export in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in BRIDGES:
        fit_bridge(folder, kind)
        assert main("export", folder / kind, "--bridge") == 0
    return folder


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of `latentmodal export`, which must refuse."""
    capsys.readouterr()
    assert main("export", *arguments) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    return told[0]


@pytest.mark.parametrize("kind", BRIDGES)
def test_the_export_maps_as_the_run_does_bit_for_bit(kind: str, runs: Path) -> None:
    model, bridge = model_of(runs / kind), load(runs / kind / "bridge").eval()
    assert isinstance(bridge, Bridge)
    assert (bridge.in_dim, bridge.out_dim) == (model.image_encoder.width, model.llm.width)
    assert bridge.state_dict().keys() == model.bridge.state_dict().keys()
    features = torch.randn(2, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(bridge(features), model.bridge(features))


def test_a_second_stages_qformer_brings_no_text_branch(runs: Path) -> None:
    names = load(runs / "qformer/bridge").state_dict()
    assert not [name for name in names if re.search("word|text|caption|position_embed", name)]


def test_the_folder_holds_three_files(runs: Path) -> None:
    for kind in BRIDGES:
        assert sorted(path.name for path in (runs / kind / "bridge").iterdir()) == sorted(FILES)
        assert not list((runs / kind).glob(".bridge*"))


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_it_is_and_what_was_measured(runs: Path) -> None:
    card = (runs / "chain/bridge" / CARD_FILE).read_text()
    assert front_matter(card) == {
        "library_name": "latentmodal",
        "tags": ["bridge", "average_pool", "mlp", "image-text-to-text"],
    }
    for fact in (
        "# to_export\n\na run to take a bridge from.\n",
        f"(B, {PATCHES}, {WIDTH})",
        f"(B, 1, {LLM_WIDTH})",
        "`timm: vit_tiny_patch16_224`",
        f"/llm`, width {LLM_WIDTH}",
        "`emoji: tiny train`",
        "2 steps of 4",
        "format of these files | 1.2.0",
        "# license: yours to choose",
    ):
        assert fact in card, fact
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if "| scenes |" in line]
    measured = sections(runs / "chain/eval.json")["scenes"]
    assert {row[1]: (int(row[4]), row[5]) for row in rows} == {
        name: (metric["n"], metric["protocol"].replace("|", "\\|"))
        for name, metric in measured.items()
    }


def test_the_card_keeps_this_machine_to_itself(runs: Path) -> None:
    for kind in BRIDGES:
        assert str(runs) not in (runs / kind / "bridge" / CARD_FILE).read_text()


def test_the_cards_lines_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (runs / "resampler/bridge" / CARD_FILE).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(runs / "resampler")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokens"].shape == (1, 3, LLM_WIDTH)


def test_the_recipe_in_the_card_is_the_runs(runs: Path) -> None:
    card = (runs / "mlp/bridge" / CARD_FILE).read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    own = yaml.safe_load((runs / "mlp/recipe.yaml").read_text())
    shown = yaml.safe_load(text)
    for key in ("name", "seed", "data", "optim", "trainer", "freeze"):
        assert shown[key] == own[key]
    assert shown["system"]["bridge"] == own["system"]["bridge"]


def test_an_earlier_checkpoint_has_no_figures_of_a_later_one(runs: Path, tmp_path: Path) -> None:
    early = runs / "mlp/checkpoints/step=00000001.ckpt"
    found = sorted((runs / "mlp/checkpoints").glob("*.ckpt"))
    assert early in found
    assert main("export", early, tmp_path / "early", "--bridge") == 0
    card = (tmp_path / "early" / CARD_FILE).read_text()
    assert "1 steps of 4" in card and "## Figures" not in card
    first, last = (load(tmp_path / "early").state_dict(), load(runs / "mlp/bridge").state_dict())
    assert not torch.equal(first["proj.0.weight"], last["proj.0.weight"])


def test_an_export_replaces_an_export(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main("export", runs / "mlp", target, "--bridge") == 0
    assert main("export", runs / "chain", target, "--bridge") == 0
    assert load(target).config.name == "chain"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"config.json": '{"model_type": "bert"}', "model.safetensors": ""},
        {"README.md": "# Mine"},
        {"config.json": '{"format_version": 1, "bridge": "mlp"}', "notes.txt": "mine"},
    ],
)
def test_other_peoples_folders_are_left_alone(
    files: dict[str, str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = complaint(capsys, runs / "mlp", tmp_path, "--bridge")
    assert told.endswith(f"{tmp_path}: holds files that are no export; give a new folder")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_failed_write_leaves_the_export_of_before(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    assert main("export", runs / "mlp", target, "--bridge") == 0
    rename = Path.rename

    def no_space(self: Path, other: Path) -> Path:
        if self.name == ".out.new":
            raise OSError("no space left")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", no_space)
    told = complaint(capsys, runs / "chain", target, "--bridge")
    assert told.endswith("out: cannot be written (no space left); choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load(target).config.name == "mlp"


def test_mistakes_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs / "mlp/recipe.yaml", unfinished)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((runs / "mlp",), "say what to export: --bridge"),
        ((tmp_path / "none", "--bridge"), "none: no run here (recipe.yaml is missing)"),
        ((unfinished, "--bridge"), "checkpoints: holds no intact checkpoint; train first"),
        ((runs / "mlp", tmp_path / "file", "--bridge"), "file: is a file; give a folder to write"),
        ((runs / "mlp", "--bridge", "--push", "a/b/c"), "a/b/c: is no address"),
    ):
        assert message in complaint(capsys, *arguments)


def test_a_run_that_was_cut_off_gives_what_it_has(runs: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(runs / "mlp", tmp_path / "cut")
    for name in ("finished.json", "eval.json"):
        (cut / name).unlink()
    assert main("export", cut, "--bridge") == 0
    assert load(cut / "bridge").config == load(runs / "mlp/bridge").config
    assert "## Figures" not in (cut / "bridge" / CARD_FILE).read_text()


@pytest.mark.parametrize("kind", BRIDGES)
def test_a_recipe_starts_from_an_export(kind: str, runs: Path) -> None:
    model = model_of(runs / kind)
    for parameter in model.bridge.parameters():
        torch.nn.init.zeros_(parameter)
    PretrainedConfig(path=str(runs / kind / "bridge"), format="latentmodal").load_into(model)
    begun = model.bridge.state_dict()
    exported = load(runs / kind / "bridge").state_dict()
    assert all(torch.equal(begun[name], value) for name, value in exported.items())


def test_two_towers_have_no_bridge(
    tmp_path: Path, emoji_cache: Path, tiny_clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "clip.yaml"
    recipe.write_text(f"{tiny_clip}run_dir: {tmp_path / 'clip'}\n")
    assert main("fit", recipe, "evaluation.tasks=null", "trainer.max_steps=2") == 0
    told = complaint(capsys, tmp_path / "clip", "--bridge")
    assert "trains no bridge" in told and "latentmodal convert" in told
    assert not (tmp_path / "clip/bridge").exists()


def test_an_export_goes_to_the_hub_with_its_card(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def upload(folder: Path, address: str, *, private: bool, message: str) -> str:
        sent.append((sorted(path.name for path in folder.iterdir()), address, private))
        return "https://hub/me/mine"

    monkeypatch.setattr(hub, "upload", upload)
    where = ("--bridge", "--push", "me/mine", "--private")
    assert main("export", runs / "mlp", tmp_path / "out", *where) == 0
    assert sent == [(sorted(FILES), "me/mine", True)]


def test_what_the_hub_refuses_leaves_the_export(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = complaint(capsys, runs / "mlp", tmp_path / "out", "--bridge", "--push", "me/mine")
    assert "me/mine: needs huggingface_hub; pip install" in told
    assert load(tmp_path / "out").config.name == "mlp"
