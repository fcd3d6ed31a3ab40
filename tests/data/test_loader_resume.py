"""Saved after batch k, a loader goes on with exactly batch k + 1: samples, augmentation, counts."""

from __future__ import annotations

import io
import shutil
from itertools import islice

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.errors import UserError

STEPS = 6  # batches of 4 per epoch; the first source has 12 samples, the second 10


def _noisy(image: Image.Image) -> Tensor:
    """An augmentation that draws from torch's generator."""
    return torch.cat([pil_to_tensor(image), torch.randint(0, 256, (1, 2, 2), dtype=torch.uint8)])


def _sources(make_shards) -> list[ShardSourceConfig]:
    first, second = make_shards(4, 3, source=0), make_shards(2, 5, source=1)
    (broken := second[1]).write_bytes(broken.read_bytes()[: 4 * 2048 + 600])
    return [
        ShardSourceConfig(urls=[str(p) for p in first], weight=2.0),
        ShardSourceConfig(urls=str(second[0].parent)),
    ]


def _loader(sources, workers=0, **options) -> TrainLoader:
    settings = {"batch_size": 4, "shuffle_window": 2, "max_bad_fraction": 0.5, "workers": workers}
    seed = options.pop("seed", 0)
    steps = options.pop("steps", STEPS)
    ranks = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    config = LoaderConfig(**{**settings, **options})
    return TrainLoader(sources, config, steps=steps, seed=seed, image_transform=_noisy, **ranks)


def _contents(batch) -> tuple:
    return batch.captions, batch.pixels_BCHW.tolist(), batch.draws, batch.faults


def _endless(loader: TrainLoader):
    while True:
        yield from loader


def _saved(state: dict) -> dict:
    """The state as a checkpoint would give it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# Batches of 4 with windows of 2 per source: 1 and 3 stop inside windows, shards end after every
# third or fifth sample of a source, 6 and 12 are ends of epochs, 8 lies in the second epoch.
@pytest.mark.parametrize(("workers", "stops"), [(0, range(14)), (2, (0, 1, 3, 6, 8))])
def test_resume_is_exact(make_shards, workers, stops):
    sources = _sources(make_shards)
    loader = _loader(sources, workers)
    states, batches = {}, []
    if 0 in stops:
        states[0] = _saved(loader.state_dict())
    for step, batch in enumerate(islice(_endless(loader), 16), start=1):
        batches.append(_contents(batch))
        if step in stops:
            states[step] = _saved(loader.state_dict())
    final = loader.bad_samples.state_dict()
    assert final["counts"] and len({str(batch) for batch in batches}) == 16
    for stop in stops:
        resumed = _loader(sources, workers)
        resumed.load_state_dict(states[stop])
        again = [_contents(batch) for batch in islice(_endless(resumed), 16 - stop)]
        assert again == batches[stop:], f"resumed after batch {stop}"
        assert resumed.bad_samples.state_dict() == final


def test_draws_name_the_visit(make_shards):
    sources = _sources(make_shards)
    batches = list(islice(_endless(_loader(sources)), 16))
    draws = [draw for batch in batches for draw in batch.draws]
    assert len(set(draws)) == len(draws) == 64  # each sample was met about three times
    assert all(0 <= draw < 2**63 for draw in draws) and max(draws) > 2**60
    other = [d for batch in islice(_endless(_loader(sources, seed=1)), 16) for d in batch.draws]
    assert not set(draws) & set(other)
    assert all(0.2 < sum(d >> bit & 1 for d in draws) / 64 < 0.8 for bit in (0, 31, 62))


def test_data_may_be_moved_between_stop_and_resume(make_shards, tmp_path):
    shards = make_shards(3, 5)
    batches = _endless(_loader([ShardSourceConfig(urls=[str(path) for path in shards])]))
    first = [_contents(batch) for batch in islice(batches, 4)]
    moved = shutil.copytree(shards[0].parent, tmp_path / "elsewhere")
    sources = [ShardSourceConfig(urls=[str(moved / path.name) for path in shards])]
    elsewhere = _loader(sources)
    assert [_contents(batch) for batch in islice(_endless(elsewhere), 4)] == first
    resumed = _loader(sources)
    resumed.load_state_dict(_saved(elsewhere.state_dict()))
    assert _contents(next(_endless(resumed))) == _contents(next(batches))


@pytest.mark.parametrize("workers", [0, 2])
def test_saving_again_before_the_first_batch_keeps_the_place(make_shards, workers):
    sources = _sources(make_shards)
    loader = _loader(sources, workers)
    batches = [_contents(batch) for batch in loader]
    fresh = _loader(sources, workers)
    for _ in islice(fresh, 2):
        pass
    twice = _loader(sources, workers)
    twice.load_state_dict(_saved(fresh.state_dict()))
    third = _loader(sources, workers)
    third.load_state_dict(_saved(twice.state_dict()))
    assert [_contents(batch) for batch in third] == batches[2:]


@pytest.mark.parametrize(("stop", "rest"), [(2, STEPS - 2), (STEPS, STEPS)])
def test_the_first_epoch_after_resuming_is_what_was_left(make_shards, stop, rest):
    sources = _sources(make_shards)
    loader = _loader(sources)
    for _ in islice(loader, stop):
        pass
    resumed = _loader(sources)
    resumed.load_state_dict(loader.state_dict())
    iter(resumed)  # a trainer may ask for an iterator it does not use
    assert len(list(resumed)) == rest
    assert len(list(resumed)) == len(resumed) == STEPS


def test_leaving_an_epoch_early_starts_a_whole_one_and_skips_nothing(make_shards):
    sources = _sources(make_shards)
    whole = [_contents(batch) for batch in islice(_endless(_loader(sources)), 8)]
    loader = _loader(sources)
    first = [_contents(batch) for batch in islice(loader, 2)]
    assert first + [_contents(batch) for batch in loader] == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"workers": 1}, "workers=0"),
        ({"world_size": 2}, "world_size=1"),
        ({"seed": 1}, "seed=0"),
        ({"batch_size": 8}, "batch_size=4"),
        ({"shuffle_window": 3}, "shuffle_window=2"),
    ],
)
def test_another_layout_is_refused_by_name(make_shards, change, named):
    sources = _sources(make_shards)
    state = _loader(sources).state_dict()
    with pytest.raises(UserError, match=named):
        _loader(sources, **change).load_state_dict(state)
    with pytest.raises(UserError, match="sources="):
        _loader(sources[:1]).load_state_dict(state)


def test_global_generators_neither_matter_nor_move(make_shards):
    sources = _sources(make_shards)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = [_contents(batch) for batch in _loader(sources)]
    assert torch.equal(torch.rand(3), expected)
    assert [_contents(batch) for batch in _loader(sources)] == one
    assert [_contents(batch) for batch in _loader(sources, seed=1)] != one


def _two_ranks(rank: int, folder: str, sources: list[ShardSourceConfig], workers: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    loader = _loader(sources, workers)
    batches = []
    for step, batch in enumerate(islice(_endless(loader), 9)):
        if step == 4:
            state = loader.state_dict()
        batches.append(_contents(batch))
    assert len(state["ranks"]) == 2
    resumed = _loader(sources, workers)
    resumed.load_state_dict(_saved(state))
    # The state was taken after the fifth batch had been given out.
    assert [_contents(batch) for batch in islice(_endless(resumed), 4)] == batches[5:]
    everyone: list = [None, None]
    dist.all_gather_object(everyone, batches)
    assert everyone[0] != everyone[1]
    dist.destroy_process_group()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_resumes_its_own_place(make_shards, tmp_path, workers):
    mp.start_processes(
        _two_ranks, (str(tmp_path), _sources(make_shards), workers), nprocs=2, start_method="fork"
    )
