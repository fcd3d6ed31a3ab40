"""Short contrastive runs on one or two ranks; `test_strategies.py` runs this file and compares.

Usage: strategy_cases.py OUT WORLD RANK PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from latentmodal.encoders import TextTransformerConfig, TimmImageConfig
from latentmodal.experiments.data.collate import Batch, TextTensors
from latentmodal.experiments.systems.contrastive import ContrastiveConfig, HeadConfig
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.experiments.training.strategies import build_strategy

STEPS, BATCH = 4, 8
CASES = ["info_nce", "sigmoid", "locked", "chunked", "matched"]


def system_config(case: str) -> ContrastiveConfig:
    sigmoid = case == "sigmoid"
    return ContrastiveConfig(
        image_encoder=TimmImageConfig(
            model="vit_tiny_patch16_224",
            image_size=32,
            model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2},
        ),
        text_encoder=TextTransformerConfig(
            vocab_size=50, context_length=8, width=32, depth=2, heads=2, eot_id=2
        ),
        tokenizer=None,
        head=HeadConfig(embed_dim=16, init_logit_bias=-2.0 if sigmoid else None),
        loss="sigmoid" if sigmoid else "info_nce",
        chunk_size=2 if case == "chunked" else None,
    )


def global_batch(step: int, case: str) -> Batch:
    """The same eight pairs of step `step` for every process."""
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(3, 50, (BATCH, 8), generator=generator)
    ids_BT[:, -1] = 2
    same = torch.tensor([0, 1, 2, 3, 0, 4, 5, 1]) if case == "matched" else None
    return Batch(
        pixels_BCHW=torch.randint(
            0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8
        ),
        text=TextTensors(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)),
        keys=[str(row) for row in range(BATCH)],
        captions=[""] * BATCH,
        all_captions=[[""]] * BATCH,
        meta=[{}] * BATCH,
        index_B=torch.zeros(BATCH, dtype=torch.int64),
        image_ids_B=same,
        text_ids_M=same,
    )


def rows(batch: Batch, part: slice) -> Batch:
    return Batch(
        pixels_BCHW=batch.pixels_BCHW[part],
        text=TextTensors(batch.text.ids_BT[part], batch.text.mask_BT[part]),
        keys=batch.keys[part],
        captions=batch.captions[part],
        all_captions=batch.all_captions[part],
        meta=batch.meta[part],
        index_B=batch.index_B[part],
        image_ids_B=None if batch.image_ids_B is None else batch.image_ids_B[part],
        text_ids_M=None if batch.text_ids_M is None else batch.text_ids_M[part],
    )


class Record(pl.Callback):
    """The mean loss over ranks at each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        self.losses.append(float(loss))


def train(case: str, parallelism: str, rank: int, world: int) -> tuple[list[float], dict[str, Any]]:
    """Losses and updated trainable parameters of a short run."""
    pl.seed_everything(0, verbose=False)
    trainer_config = TrainerConfig(
        max_steps=STEPS, accelerator="cpu", devices=world, parallelism=parallelism
    )
    plan = FreezePlan({"image_encoder.*": "frozen"} if case == "locked" else {})
    # An eps far above rounding noise: Adam divides by the gradient's own size.
    optim = OptimConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, warmup_steps=2, grad_clip=1.0)
    system = system_config(case).build(plan, optim, trainer_config)
    local = BATCH // world
    part = slice(rank * local, (rank + 1) * local)
    batches = [rows(global_batch(step, case), part) for step in range(STEPS)]
    record = Record()
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=world,
        strategy=build_strategy(trainer_config),
        gradient_clip_val=optim.grad_clip,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
    trainer.fit(system, DataLoader(batches, batch_size=None))
    if parallelism == "fsdp":
        assert all(isinstance(p, DTensor) for p in system.model.parameters())
        sharded = sum(p.to_local().numel() for p in system.model.parameters())
        assert sharded < 0.6 * sum(p.numel() for p in system.model.parameters())
    return record.losses, trainer.strategy.lightning_module_state_dict()


def main(out: Path, world: int, rank: int, port: int) -> None:
    """Run every case at this world size; rank 0 writes losses and parameters to `out`."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    modes = ("single",) if world == 1 else ("ddp", "fsdp")
    results = {
        f"{case}-{mode}": train(case, mode, rank, world)
        for mode in modes
        for case in CASES
        if (case, mode) != ("chunked", "fsdp")  # refused by the recipe
    }
    if rank == 0:
        torch.save(results, out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
