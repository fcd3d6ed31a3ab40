"""Runs the losses on 2, 3 and 4 gloo ranks and on none; `python rank_cases.py OUT` saves results.

A script rather than a test module: one process imports torch once and forks every rank from it.
OUT is a `torch.save` of {world: {case: values}}; world 1 holds the reference, which is computed
from the whole batch with loops over pairs and nothing of the package but the head.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 needs it; imported once here and not once in every rank
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from latentmodal.bridges import ContrastiveHeadConfig, gather_with_grad, info_nce, sigmoid_loss
from latentmodal.bridges.losses import sigmoid

WORLDS = (2, 3, 4)
IMAGES, CAPTIONS, EMBED = 24, 36, 6  # divisible by every world


class Pair(nn.Module):
    """Two linear towers and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Linear(5, 7)
        self.text_tower = nn.Linear(4, 8)
        self.head = ContrastiveHeadConfig(
            image_dim=7, text_dim=8, embed_dim=EMBED, init_logit_bias=-2.0, text_bias=True
        ).build()

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        return self.head(self.image_tower(images), self.text_tower(texts))


def make_model() -> Pair:
    torch.manual_seed(0)
    return Pair().double()


def make_batch(with_ids: bool) -> dict[str, Tensor | None]:
    """Without ids: as many texts as images. With: 1.5 texts an image, and equal images."""
    generator = torch.Generator().manual_seed(1)
    texts = CAPTIONS if with_ids else IMAGES
    batch: dict[str, Tensor | None] = {
        "images": torch.randn(IMAGES, 5, generator=generator, dtype=torch.float64),
        "texts": torch.randn(texts, 4, generator=generator, dtype=torch.float64),
        "image_ids": None,
        "text_ids": None,
    }
    if with_ids:
        batch["image_ids"] = torch.randint(0, 15, (IMAGES,), generator=generator)
        batch["text_ids"] = torch.randint(0, 15, (CAPTIONS,), generator=generator)
    return batch


CASES = {
    f"{loss}{'-ids' if ids else ''}{f'-smooth{smoothing}' if smoothing else ''}": (
        loss,
        ids,
        smoothing,
    )
    for loss, smoothing in (("info_nce", 0.0), ("info_nce", 0.1), ("sigmoid", 0.0))
    for ids in (False, True)
}


def reference(loss: str, with_ids: bool, smoothing: float) -> dict[str, Tensor]:
    model, batch = make_model(), make_batch(with_ids)
    out = model(batch["images"], batch["texts"])
    cosine = out.image_BE @ out.text_BE.T
    if with_ids:
        match = [[bool(i == t) for t in batch["text_ids"]] for i in batch["image_ids"]]
    else:
        match = [[i == t for t in range(IMAGES)] for i in range(IMAGES)]
    if loss == "sigmoid":
        logits = out.logit_scale * cosine + out.logit_bias
        total = logits.new_zeros(())
        for i, row in enumerate(match):
            for t, y in enumerate(row):
                total = total - torch.log(torch.sigmoid(logits[i, t] if y else -logits[i, t]))
        value = total / IMAGES
    else:
        logits = out.logit_scale * cosine
        columns = [list(column) for column in zip(*match, strict=True)]
        value = (
            naive_cross_entropy(logits, match, smoothing)
            + naive_cross_entropy(logits.T, columns, smoothing)
        ) / 2
    value.backward()
    return {"loss": value.detach()} | gradients(model)


def naive_cross_entropy(logits: Tensor, match: list[list[bool]], smoothing: float) -> Tensor:
    total = logits.new_zeros(())
    for row, right in zip(logits, match, strict=True):
        log_probability = row - torch.log(torch.exp(row).sum())
        positives = [column for column, y in enumerate(right) if y]
        for column in positives:
            total = total - (1 - smoothing) * log_probability[column] / len(positives)
        if positives:
            total = total - smoothing * log_probability.mean()
    return total / len(logits)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return grads


def local_rows(batch: dict[str, Tensor | None], rank: int, world: int) -> dict[str, Tensor | None]:
    return {k: None if v is None else v.chunk(world)[rank] for k, v in batch.items()}


def local_loss(loss: str, smoothing: float, out: Any, rows: dict, group: Any = None) -> Tensor:
    ids = {"image_ids_B": rows["image_ids"], "text_ids_M": rows["text_ids"], "group": group}
    if loss == "sigmoid":
        return sigmoid_loss(out.image_BE, out.text_BE, out.logit_scale, out.logit_bias, **ids)
    return info_nce(out.image_BE, out.text_BE, out.logit_scale, label_smoothing=smoothing, **ids)


def mean_over_ranks(values: dict[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    for value in values.values():
        dist.all_reduce(value, group=group)
        value /= dist.get_world_size(group)
    return values


def averaged_case(case: str, rank: int, world: int, group: Any = None) -> dict[str, Tensor]:
    """Loss and gradients averaged over the ranks, as DDP averages them."""
    loss, with_ids, smoothing = CASES[case]
    model, rows = make_model(), local_rows(make_batch(with_ids), rank, world)
    value = local_loss(loss, smoothing, model(rows["images"], rows["texts"]), rows, group)
    value.backward()
    return mean_over_ranks({"loss": value.detach()} | gradients(model), group)


def sharded_case(case: str, rank: int, world: int) -> dict[str, Tensor]:
    """The same under FSDP2, which averages by itself; then the temperature is clamped."""
    loss, with_ids, smoothing = CASES[case]
    model, rows = make_model(), local_rows(make_batch(with_ids), rank, world)
    mesh = init_device_mesh("cpu", (world,))
    for module in (model.image_tower, model.text_tower, model.head, model):
        fully_shard(module, mesh=mesh)
    value = local_loss(loss, smoothing, model(rows["images"], rows["texts"]), rows)
    value.backward()
    result = mean_over_ranks({"loss": value.detach()}) | gradients(model)
    with torch.no_grad():
        model.head.logit_scale.fill_(9.0)
    model.head.clamp_temperature_()
    result["clamped"] = model.head.logit_scale.full_tensor().detach()
    return result


def materialised_head(world: int) -> dict[str, Tensor]:
    """A head built without data, sharded, then initialised in place."""
    with torch.device("meta"):
        head = make_model().head
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    head.to_empty(device="cpu")
    torch.manual_seed(3)
    head.reset_parameters()
    return {name: p.full_tensor().detach() for name, p in head.named_parameters()}


def kept_for_backward(rank: int, world: int) -> int:
    """Elements that the sigmoid loss keeps until backward, at 8 images and 8 texts a rank."""
    generator = torch.Generator().manual_seed(rank)
    image, text = torch.randn(2, 8, EMBED, generator=generator).requires_grad_()
    scale, bias = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sigmoid_loss(image, text, scale, bias)
    return sum(kept)


def unequal_batches(rank: int) -> list[str]:
    """What each entry point says when the last rank has one row less."""
    rows = 3 if rank == dist.get_world_size() - 1 else 4
    x, scale = torch.randn(rows, 2), torch.ones(1)
    calls = (
        lambda: gather_with_grad(x),
        lambda: info_nce(x, x, scale),
        lambda: sigmoid_loss(x, x, scale, scale),
    )
    messages = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def run_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results: dict[str, Any] = {case: averaged_case(case, rank, world) for case in CASES}
    for case in ("info_nce", "sigmoid-ids"):
        results[f"{case}-fsdp"] = sharded_case(case, rank, world)
    whole, sigmoid.CHUNK_PAIRS = sigmoid.CHUNK_PAIRS, 40
    for case in ("sigmoid", "sigmoid-ids"):
        results[f"{case}-chunked"] = averaged_case(case, rank, world)
    sigmoid.CHUNK_PAIRS = whole
    if world == 4:
        # Two groups of two, each with a whole batch to itself.
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for case in ("info_nce-ids", "sigmoid-ids"):
            results[f"{case}-group"] = averaged_case(case, rank % 2, 2, groups[rank // 2])
    results["materialised"] = materialised_head(world)
    results["kept"] = kept_for_backward(rank, world)
    results["unequal"] = unequal_batches(rank)
    # The last rank, because in the group case it is not a member of the first group.
    if rank == world - 1:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


def main(out: str) -> None:
    torch.set_num_threads(1)
    results: dict[int, Any] = {1: {case: reference(*CASES[case]) for case in CASES}}
    results[1]["kept"] = kept_for_backward(0, 1)
    method = "fork" if sys.platform == "linux" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            store, part = Path(folder, f"store{world}"), Path(folder, f"part{world}")
            mp.start_processes(
                run_rank, (world, str(store), str(part)), nprocs=world, start_method=method
            )
            results[world] = torch.load(part)
    torch.save(results, out)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1])
