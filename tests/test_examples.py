"""The examples and an exported bridge, in environments that have nothing else of this project."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from bridge_runs import LLM_WIDTH, PATCHES, WIDTH, fit_bridge
from command_line import main
from latentmodal.bridges import load

ROOT = Path(__file__).parents[1]
BRIDGES = ROOT / "packages/bridges/src"
ABSENT = (
    "huggingface_hub",
    "latentmodal.encoders",
    "latentmodal.experiments",
    "lightning",
    "omegaconf",
    "timm",
    "transformers",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path) -> Path:
    """The bridge of a finished run, which lies beside the run's language model."""
    folder = tmp_path_factory.mktemp("runs")
    assert main("export", fit_bridge(folder, "chain"), folder / "my-bridge", "--bridge") == 0
    return folder / "my-bridge"


def distributions(*names: str) -> Iterator[metadata.Distribution]:
    """These, and all they need here."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # an option of another system
            continue
        yield found
        for text in found.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)


def environment(folder: Path, *names: str) -> Path:
    """The interpreter of a venv with these packages, by links, and the bridges; nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for distribution in distributions(*names):
        tops = {Path(file).parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "bridges.pth").write_text(f"{BRIDGES}\n")
    return folder / "bin/python"


def run_in(python: Path, *arguments: object) -> str:
    """What it prints, nothing of this environment's own being in sight."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, *map(str, arguments)],
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has torch and safetensors alone."""
    return environment(tmp_path_factory.mktemp("plain") / "venv", "torch", "safetensors")


IMPORTS = """
import importlib, sys, torch
from latentmodal.bridges import load
found = []
for name in {absent}:
    try:
        importlib.import_module(name)
        found.append(name)
    except ModuleNotFoundError:
        pass
bridge = load(sys.argv[1]).eval()
torch.save(bridge(torch.load(sys.argv[2])), sys.argv[3])
try:
    load("hf://me/mine")
except ValueError as error:
    print(found, error)
"""


def test_the_bridge_loads_with_torch_and_safetensors_alone(
    exported: Path, plain_python: Path, tmp_path: Path
) -> None:
    features, tokens = tmp_path / "features.pt", tmp_path / "tokens.pt"
    torch.save(torch.randn(2, PATCHES, WIDTH), features)
    code = IMPORTS.format(absent=ABSENT)
    told = run_in(plain_python, "-c", code, exported, features, tokens)
    assert told == (
        "[] hf://me/mine: needs huggingface_hub; pip install huggingface_hub, or give a folder\n"
    )
    assert torch.equal(torch.load(tokens), load(exported).eval()(torch.load(features)))


def test_plain_pytorch_example(exported: Path, plain_python: Path) -> None:
    told = run_in(plain_python, ROOT / "examples/plain_pytorch.py", exported)
    assert f"Chain: (4, {PATCHES}, {WIDTH}) -> (4, 1, {LLM_WIDTH})" in told
    first, *_, last = map(float, re.findall(r"([\d.]+) of the tokens' variance is missed", told))
    assert last < 0.2 * first


def test_transformers_example(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    needs = ("torch", "torchvision", "transformers", "pillow", "safetensors")
    python = environment(tmp_path_factory.mktemp("hf") / "venv", *needs)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vision")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    Image.new("RGB", (48, 40), "red").save(tmp_path / "red.png")
    told = run_in(
        *(python, ROOT / "examples/transformers_llm.py", exported, tmp_path / "vision"),
        *(exported.parent / "llm", tmp_path / "red.png", "what is this?"),
    )
    assert f"{PATCHES + 1} features -> 1 soft tokens of width {LLM_WIDTH}" in told
    assert re.search(r"answer: .+", told)


def test_the_examples_fit_a_screen() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        code = re.sub(r'^""".*?"""\n', "", path.read_text(), flags=re.DOTALL)
        assert len([line for line in code.splitlines() if line.strip()]) <= 40, path.name
