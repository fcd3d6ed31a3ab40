"""Cached features as the loader reads them: which sample, which view, what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.faults import BadSampleError
from latentmodal.experiments.data.features.key import FeatureKey, shard_identity
from latentmodal.experiments.data.features.pictures import Part, PictureStream, picture_loader
from latentmodal.experiments.data.features.reader import FeatureReader
from latentmodal.experiments.data.features.store import FeatureStore, Manifest
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError

KEY = FeatureKey(
    weights="0" * 64, depth=0, num_tokens=4, width=3, precision="fp32", preprocessing={"size": 2}
)


def _store(folder: Path, views: int = 1) -> FeatureStore:
    manifest = Manifest(key=KEY, views=views, dtype="float32")
    return FeatureStore.create(folder, manifest, torch.zeros(4, 3))


def _colours(pixels_RCHW: Tensor) -> Tensor:
    """A tower for which a token is a pixel."""
    return pixels_RCHW.float().flatten(2).transpose(1, 2)


def _fill(store: FeatureStore, shards: Sequence[str], per_file: int = 2) -> None:
    """Every shard in files of about `per_file` samples, as the command writes them."""
    views = store.manifest.views
    config = LoaderConfig(batch_size=per_file, workers=0)
    for shard in shards:
        stream = PictureStream([Part(shard, shard_identity(shard), 0)], _noisy, config, views)
        batches = list(picture_loader(stream, 0))
        for number, batch in enumerate(batches):
            rows = _colours(batch.pixels_RCHW) if batch.ordinals else torch.empty(0, 4, 3)
            store.write(
                shard_identity(shard),
                number,
                features_RVND=rows.unflatten(0, (-1, views)) if batch.ordinals else rows[:, None],
                ordinals=batch.ordinals,
                faults=batch.faults,
                span=(number * per_file, (number + 1) * per_file),
                complete=number == len(batches) - 1,
                address=shard,
            )


def _noisy(image: Image.Image) -> Tensor:
    """Adds a draw to the last channel, so that views differ."""
    pixels = pil_to_tensor(image)
    pixels[2] = torch.randint(0, 256, ()).to(torch.uint8)
    return pixels


def _plain(image: Image.Image) -> Tensor:
    return pil_to_tensor(image)


@pytest.fixture
def sources(make_shards, encode_image, tmp_path: Path) -> list[ShardSourceConfig]:
    """Two sources of unequal weight; the second has a damaged picture and one without any."""
    first = make_shards(4, 3, source=0)

    def second():
        for i in range(7):
            picture = encode_image((1, 0, i), size=(2, 2))
            members = {"png": picture[:-30] if i == 2 else picture} if i != 4 else {}
            yield {"__key__": f"{i}", "txt": f"1 0 {i}", **members}

    shards = write_shards(second(), tmp_path / "second", 7)
    return [
        ShardSourceConfig(urls=[str(path) for path in first], weight=2.0),
        ShardSourceConfig(urls=[str(path) for path in shards]),
    ]


def _shards(sources: Sequence[ShardSourceConfig]) -> list[str]:
    return [shard for source in sources for shard in source.url_list]


def _loader(sources, features=None, workers: int = 0) -> TrainLoader:
    config = LoaderConfig(batch_size=4, workers=workers, shuffle_window=3, max_bad_fraction=0.9)
    return TrainLoader(sources, config, steps=30, seed=3, image_transform=_plain, features=features)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_from_a_cache_are_those_from_pictures(sources, tmp_path, workers) -> None:
    store = _store(tmp_path / "cache")
    _fill(store, _shards(sources))
    reader = FeatureReader.of_shards(store, _shards(sources))
    cached, plain = _loader(sources, reader, workers), _loader(sources, workers=workers)
    faults = 0
    for ours, theirs in zip(cached, plain, strict=True):
        assert ours.keys == theirs.keys
        assert ours.captions == theirs.captions
        assert ours.draws == theirs.draws
        assert ours.faults == theirs.faults
        assert ours.pixels_BCHW.shape == (4, 3, 0, 0)
        assert theirs.features_BND is None
        assert ours.features_BND is not None
        expected = _colours(theirs.pixels_BCHW)
        assert torch.equal(ours.features_BND[..., :2], expected[..., :2])
        faults += len(ours.faults)
    assert faults > 4, "the damaged picture and the missing one were met"
    assert cached.bad_samples.state_dict() == plain.bad_samples.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cached_stream_resumes_where_it_stopped(sources, tmp_path, workers) -> None:
    store = _store(tmp_path / "cache")
    _fill(store, _shards(sources))
    reader = FeatureReader.of_shards(store, _shards(sources))
    whole = [batch.features_BND for batch in _loader(sources, reader, workers)]
    first = _loader(sources, reader, workers)
    for _, _ in zip(range(11), first, strict=False):
        pass
    # The place may even be taken over by a run from pictures, and back.
    state = first.state_dict()
    second = _loader(sources, reader, workers)
    second.load_state_dict(state)
    rest = [batch.features_BND for batch in second]
    assert len(rest) == 19
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[11:], strict=True))


def test_a_view_is_drawn_by_the_visit(sources, tmp_path) -> None:
    store = _store(tmp_path / "cache", views=3)
    shard = _shards(sources)[0]
    _fill(store, [shard])
    reader = FeatureReader.of_shards(store, [shard])
    seen = {seed: float(reader.read(shard, 1, seed)[0, 2]) for seed in range(40)}
    assert len(set(seen.values())) == 3
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own, as workers get it
    assert seen == {seed: float(again.read(shard, 1, seed)[0, 2]) for seed in range(40)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_pictures_come_in_order_however_many_decode(sources, workers) -> None:
    parts = [Part(shard, shard_identity(shard), 0) for shard in _shards(sources)]
    parts[1] = parts[1]._replace(first=2)
    stream = PictureStream(parts, _noisy, LoaderConfig(batch_size=2), views=2)
    found: dict[int, list[int]] = {}
    faults: list[tuple[int, dict[int, str]]] = []
    rows = []
    for batch in picture_loader(stream, workers):
        assert list(found) == sorted(found), "one shard after the other"
        found.setdefault(batch.part, []).extend(batch.ordinals)
        faults += [(batch.part, batch.faults)] if batch.faults else []
        rows += [batch.pixels_RCHW] if batch.ordinals else []
    assert found == {0: [0, 1, 2], 1: [2], 2: [0, 1, 2], 3: [0, 1, 2], 4: [0, 1, 3, 5, 6]}
    assert faults == [(4, {2: "corrupt image"})]
    pixels_RCHW = torch.cat(rows)
    assert len(pixels_RCHW) == 2 * 15
    assert pixels_RCHW[0::2, :2].equal(pixels_RCHW[1::2, :2])
    assert not pixels_RCHW[0::2].equal(pixels_RCHW[1::2])


def test_a_damaged_picture_keeps_its_cause(sources, tmp_path) -> None:
    store, shard = _store(tmp_path / "cache"), _shards(sources)[-1]
    _fill(store, [shard])
    reader = FeatureReader.of_shards(store, [shard])
    with pytest.raises(BadSampleError, match="corrupt image"):
        reader.read(shard, 2, 0)
    assert reader.read(shard, 3, 0).shape == (4, 3)
    with pytest.raises(UserError, match="lacks sample 4"):
        reader.read(shard, 4, 0)


def test_a_damaged_file_is_refused_in_one_line(sources, tmp_path) -> None:
    store, shard = _store(tmp_path / "cache"), _shards(sources)[0]
    _fill(store, [shard])
    reader = FeatureReader.of_shards(store, [shard])
    file = store.folder / f"{shard_identity(shard)}-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole file of features") as refused:
        FeatureReader.of_shards(store, [shard])
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no whole file of features"):
        next(iter(_loader([ShardSourceConfig(urls=shard)], reader, workers=1)))


def test_a_gap_is_not_passed_over(sources, tmp_path) -> None:
    store, shard = _store(tmp_path / "cache"), _shards(sources)[-1]
    _fill(store, [shard])
    identity = shard_identity(shard)
    assert [chunk.stop for chunk in store.chunks(identity)] == [2, 4, 6, 8]
    (store.folder / f"{identity}-00001.safetensors").unlink()
    assert [chunk.stop for chunk in store.chunks(identity)] == [2]
    with pytest.raises(UserError, match="in part only"):
        FeatureReader.of_shards(store, [shard])


def test_a_shard_is_known_by_its_bytes(sources, tmp_path) -> None:
    store, shard = _store(tmp_path / "cache"), Path(_shards(sources)[0])
    _fill(store, [str(shard)])
    moved = shard.rename(tmp_path / "moved.tar")
    assert FeatureReader.of_shards(store, [str(moved)]).read(str(moved), 0, 0).shape == (4, 3)
    data = bytearray(moved.read_bytes())
    data[700] ^= 1
    moved.write_bytes(data)
    with pytest.raises(UserError, match="changed or was never cached"):
        FeatureReader.of_shards(store, [str(moved)])


def test_a_folder_keeps_to_one_kind_of_features(tmp_path) -> None:
    store = _store(tmp_path / "cache")
    changed = {
        "weights": replace(KEY, weights="1" * 64),
        "depth was 0, is 1": replace(KEY, depth=1),
        "preprocessing size was 2, is 3": replace(KEY, preprocessing={"size": 3}),
    }
    for words, key in changed.items():
        assert KEY.changes(key) == [words]
        assert key.fingerprint != KEY.fingerprint
        with pytest.raises(UserError, match=words):
            FeatureStore.create(
                store.folder, Manifest(key=key, views=1, dtype="float32"), torch.zeros(4, 3)
            )
    with pytest.raises(UserError, match="views was 1, is 2"):
        _store(store.folder, views=2)
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStore(store.folder)
    with pytest.raises(UserError, match="holds no cached features"):
        FeatureStore(tmp_path / "elsewhere")
