"""The package needs torch and transformers alone; its README examples run as printed."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "llm" / "README.md"

FOREIGN = {
    "gguf",
    "lightning",
    "omegaconf",
    "peft",
    "pytorch_lightning",
    "tensorboard",
    "timm",
    "torchmetrics",
    "webdataset",
}

PROBE = """
import sys, latentmodal.llm
print(*{name.split(".")[0] for name in sys.modules})
print(*{".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("latentmodal.")})
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_torch_and_transformers_only():
    everything, ours = run(PROBE).splitlines()
    assert FOREIGN.isdisjoint(everything.split())
    assert "torch" in everything.split()
    assert ours.split() == ["latentmodal.llm"]


def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert run("\n".join(examples)) == "32 ('question',)\n"
