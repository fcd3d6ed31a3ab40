"""Short runs of every system on one or two ranks; `test_strategies.py` runs this and compares.

Usage: strategy_cases.py OUT WORLD RANK PORT
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from latentmodal.bridges import rank
from latentmodal.encoders import TextTransformerConfig, TimmImageConfig, Tokenizer
from latentmodal.experiments.data.collate import Batch, TextTensors
from latentmodal.experiments.data.loader import gather_objects
from latentmodal.experiments.systems.alignment import AlignmentConfig
from latentmodal.experiments.systems.alignment_model import ObjectiveWeights
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.contrastive import ContrastiveConfig, HeadConfig
from latentmodal.experiments.systems.generation import GenerationConfig, GenerationSystem
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.experiments.training.strategies import build_strategy
from latentmodal.llm import (
    IGNORE_INDEX,
    IMAGE,
    Answer,
    CausalConfig,
    GenerationSettings,
    Prompt,
    Seq2SeqBatch,
    Seq2SeqConfig,
    collate_prompts,
)

STEPS, BATCH = 4, 8
CONTRASTIVE = ["info_nce", "sigmoid", "locked", "chunked", "matched"]
ALIGNMENT = [
    "alignment", "alignment_matched", "alignment_itm_only", "alignment_itg_only",
    "alignment_no_itm",
]  # fmt: skip
GENERATION = ["generation", "generation_bf16", "generation_t5", "generation_projection"]
FROZEN = {
    **dict.fromkeys(("locked", "alignment", "alignment_matched"), ("image_encoder.*",)),
    **dict.fromkeys(GENERATION, ("image_encoder.*", "llm.*")),
    "generation_projection": ("image_encoder.*", "bridge.parts.0.*", "llm.*"),
}
IMAGE_ENCODER = TimmImageConfig(
    model="vit_tiny_patch16_224",
    image_size=32,
    model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2},
)


class Tokenized(Tokenizer):
    """Batches come tokenized; all texts begin alike."""

    vocab_size, pad_id, bos_id, eot_id = 50, 0, 1, 2

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[1] for _ in texts]


def build_system(case: str, optim: OptimConfig, trainer: TrainerConfig) -> System:
    plan = FreezePlan(dict.fromkeys(FROZEN.get(case, ()), "frozen"))
    if case in GENERATION:
        return GenerationOfIds(generation_config(case), plan, optim, trainer)
    if case in ALIGNMENT:
        return alignment_config(case).build(plan, optim, trainer, Tokenized(8, trim=True))
    return contrastive_config(case).build(plan, optim, trainer)


def alignment_config(case: str) -> AlignmentConfig:
    bridge = BRIDGE_CHOICES["qformer"](
        num_queries=3, width=16, layers=2, heads=2, mlp_dim=32, dropout=0.0, max_positions=8
    )
    objectives = {
        "alignment_itm_only": ObjectiveWeights(itc=0.0, itg=0.0),
        "alignment_itg_only": ObjectiveWeights(itc=0.0, itm=0.0),
        "alignment_no_itm": ObjectiveWeights(itm=0.0),
    }
    return AlignmentConfig(
        image_encoder=IMAGE_ENCODER,
        bridge=bridge,
        tokenizer=None,
        embed_dim=8,
        objectives=objectives.get(case, ObjectiveWeights()),
    )


def generation_config(case: str) -> GenerationConfig:
    llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    t5 = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 50}
    llm: Any = (
        Seq2SeqConfig(config={"model_type": "t5", "dropout_rate": 0.0, **t5})
        if case == "generation_t5"
        else CausalConfig(
            config={"model_type": "llama", **llama, **heads},
            dtype="bfloat16" if case == "generation_bf16" else "float32",
        )
    )
    bridge = BRIDGE_CHOICES["qformer"](
        num_queries=3, width=16, layers=2, heads=2, mlp_dim=32, dropout=0.0
    )
    if case == "generation_projection":  # MiniGPT-4's first stage
        bridge = BRIDGE_CHOICES["chain"](parts=(bridge, BRIDGE_CHOICES["linear"]()))
    return GenerationConfig(image_encoder=IMAGE_ENCODER, bridge=bridge, llm=llm)


class GenerationOfIds(GenerationSystem):
    """The system without a tokenizer: its batches hold ids."""

    def __init__(
        self,
        config: GenerationConfig,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
    ) -> None:
        System.__init__(self, config.build_model(), plan, optim, trainer)
        self.config = config


def prompts_of(batch: Batch, case: str) -> Any:
    """Captions of unequal length behind three soft tokens, for a causal model or T5."""
    texts = [
        ids[mask].tolist() for ids, mask in zip(batch.text.ids_BT, batch.text.mask_BT, strict=True)
    ]
    if case == "generation_t5":
        asked = [Prompt((IMAGE, (1,))).lay_out(lambda text: [], 3) for _ in texts]
        read = collate_prompts(asked, 0)
        length = max(map(len, texts))
        labels = [[*ids, *[IGNORE_INDEX] * (length - len(ids))] for ids in texts]
        return Seq2SeqBatch(
            read.ids_BT, read.mask_BT, read.slot_mask_BT, torch.tensor(labels),
            read.slot_counts, read.image_counts, sum(map(len, texts)), is_padded=False,
        )  # fmt: skip
    # Of the projection's rows only the first three show a picture: the second rank has none.
    shown = [case != "generation_projection" or int(key) < 3 for key in batch.keys]
    parts = [
        Prompt(((IMAGE,) if show else ()) + ((1,), Answer(tuple(ids))))
        for show, ids in zip(shown, texts, strict=True)
    ]
    return collate_prompts([prompt.lay_out(lambda text: [], 3) for prompt in parts], 0)


def contrastive_config(case: str) -> ContrastiveConfig:
    sigmoid = case == "sigmoid"
    return ContrastiveConfig(
        image_encoder=IMAGE_ENCODER,
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
    lengths_B = torch.randint(3, 9, (BATCH,), generator=generator)  # unequal on the two ranks
    mask_BT = torch.arange(8) < lengths_B[:, None]
    if case in CONTRASTIVE:
        mask_BT = torch.ones_like(mask_BT)
    same = torch.tensor([0, 1, 2, 3, 0, 4, 5, 1]) if case.endswith("matched") else None
    return Batch(
        pixels_BCHW=torch.randint(
            0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8
        ),
        text=TextTensors(ids_BT, mask_BT),
        keys=[str(row) for row in range(BATCH)],
        captions=[""] * BATCH,
        all_captions=[[""]] * BATCH,
        meta=[{}] * BATCH,
        index_B=torch.zeros(BATCH, dtype=torch.int64),
        image_ids_B=same,
        text_ids_M=same,
    )


def trimmed(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> TextTensors:
    """Padded to this rank's own longest text only, as loaders do."""
    length = int(mask_BT.sum(dim=1).max())
    return TextTensors(ids_BT[:, :length], mask_BT[:, :length])


def rows(batch: Batch, part: slice, case: str) -> Batch:
    batch = Batch(
        pixels_BCHW=batch.pixels_BCHW[part],
        text=trimmed(batch.text.ids_BT[part], batch.text.mask_BT[part]),
        keys=batch.keys[part],
        captions=batch.captions[part],
        all_captions=batch.all_captions[part],
        meta=batch.meta[part],
        index_B=batch.index_B[part],
        num_text_tokens=int(batch.text.mask_BT[part].sum()),
        image_ids_B=None if batch.image_ids_B is None else batch.image_ids_B[part],
        text_ids_M=None if batch.text_ids_M is None else batch.text_ids_M[part],
    )
    return replace(batch, prompts=prompts_of(batch, case)) if case in GENERATION else batch


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


def say(system: Any, batch: Batch) -> list[str]:
    """The first words the model says of every picture of all ranks, in order.

    The second rank goes on longer than the first, as happens when answers differ in length.
    """
    words = RustTokenizer(WordLevel({f"w{word}": word for word in range(50)}, unk_token="w0"))
    system.model.llm._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w7")
    first_ids = batch.text.ids_BT[:, 0].tolist()
    asked = [Prompt((IMAGE, (1, word))).lay_out(lambda text: [], 3) for word in first_ids]
    settings = GenerationSettings(num_beams=1, max_new_tokens=4 + 8 * rank())
    system.eval()
    with torch.no_grad():
        said = system.model.generate(
            batch.pixels_BCHW, collate_prompts(asked, 0, side="left"), settings
        )
    return [" ".join(text.split()[:4]) for part in gather_objects(said) for text in part]


def train(
    case: str, parallelism: str, rank: int, world: int
) -> tuple[list[float], dict[str, Any], list[str]]:
    """Losses, updated trainable parameters, and what is said at the end, of a short run."""
    pl.seed_everything(0, verbose=False)
    trainer_config = TrainerConfig(
        max_steps=STEPS, accelerator="cpu", devices=world, parallelism=parallelism
    )
    # An eps far above rounding noise: Adam divides by the gradient's own size.
    optim = OptimConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, warmup_steps=2, grad_clip=1.0)
    system = build_system(case, optim, trainer_config)
    local = BATCH // world
    part = slice(rank * local, (rank + 1) * local)
    batches = [rows(global_batch(step, case), part, case) for step in range(STEPS)]
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
    said = say(system, batches[0]) if case == "generation" else []
    if parallelism == "fsdp":
        assert all(isinstance(p, DTensor) for p in system.model.parameters())
        sharded = sum(p.to_local().numel() for p in system.model.parameters())
        assert sharded < 0.6 * sum(p.numel() for p in system.model.parameters())
    return record.losses, trainer.strategy.lightning_module_state_dict(), said


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
        for case in CONTRASTIVE + ALIGNMENT + GENERATION
        if (case, mode) != ("chunked", "fsdp")  # refused by the recipe
    }
    if rank == 0:
        torch.save(results, out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
