"""The package stands alone: importing and using it brings in nothing of the other rooms."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "packages/bridges/README.md"
FORBIDDEN = [
    "lightning",
    "transformers",
    "timm",
    "open_clip",
    "latentmodal.encoders",
    "latentmodal.llm",
    "latentmodal.experiments",
]


def run_fresh(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_example_runs_without_the_other_rooms(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    listing = "\nimport sys; print('\\n'.join(sys.modules))"
    modules = run_fresh(example + listing, tmp_path).split()
    assert "latentmodal.bridges" in modules
    assert not set(FORBIDDEN) & set(modules)
    assert (tmp_path / "my-bridge/model.safetensors").is_file()
