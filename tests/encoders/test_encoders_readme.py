import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "packages" / "encoders" / "README.md"


def test_the_readmes_example_runs_and_gives_the_shapes_it_states() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["picture"].shape == (3, 224, 224)
    assert names["tokens"].shape == (1, 4, 192)
    assert names["pooled"].shape == (1, 192)
    assert names["image_encoder"].num_tokens == 197
