"""Under Lightning's trainer the saved place is the batch just trained on, not one ahead."""

from __future__ import annotations

import warnings

import lightning as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import TrainLoader

STEPS = 4


class _Recorder(pl.LightningModule):
    """Trains nothing and remembers which captions it was given."""

    def __init__(self, loader: TrainLoader) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loader = loader
        self.seen: list[list[str]] = []

    def train_dataloader(self) -> TrainLoader:
        return self.loader

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.captions)
        return self.weight * batch.pixels_BCHW.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(folder, loader, resume_from=None) -> _Recorder:
    module = _Recorder(loader)
    saver = ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=3,
            callbacks=[saver],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ckpt_path=resume_from)
    loader.close()
    assert trainer.global_step == 3 * STEPS
    return module


@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 12)), (2, (3, 4, 6))])
def test_resume_under_the_trainer(make_shards, tmp_path, workers, stops):
    shards = [str(path) for path in make_shards(4, 5)]

    def loader() -> TrainLoader:
        return TrainLoader(
            [ShardSourceConfig(urls=shards)],
            LoaderConfig(batch_size=3, workers=workers, shuffle_window=4),
            steps=STEPS,
            seed=0,
            image_transform=pil_to_tensor,
        )

    whole = _fit(tmp_path / "whole", loader()).seen
    assert len(whole) == 3 * STEPS
    for stop in stops:
        checkpoint = tmp_path / "whole" / f"step={stop}.ckpt"
        assert _fit(tmp_path / str(stop), loader(), checkpoint).seen == whole[stop:]
