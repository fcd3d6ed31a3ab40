"""Runs BLIP-2's objectives on 2, 3 and 4 gloo ranks and on none; `python blip2_rank_cases.py OUT`.

OUT is a `torch.save` of {world: {case: values}}. World 1 is the package in one process, world 0 the
same mathematics written out with loops over the whole batch, with nothing of the package in it.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from latentmodal.bridges import fetch_rows, gather_with_grad, rank, world_size
from latentmodal.bridges.losses import (
    global_mean,
    grounded_generation,
    image_text_contrastive,
    image_text_matching,
    sample_hard_negatives,
)

WORLDS = (2, 3, 4)
PAIRS, QUERIES, EMBED, PATCHES, LENGTH, VOCAB = 12, 3, 4, 5, 6, 9  # PAIRS: divisible by each world
SEED = 5
# Pairs 0, 5 and 8 are about one image, pairs 3 and 4 about another.
IDS = torch.tensor([7, 1, 2, 3, 3, 7, 6, 8, 7, 9, 10, 11])
LENGTHS = (2, 3, 6, 1, 5, 2, 4, 6, 1, 3, 3, 5)
CONTRASTIVE = {
    "itc": (False, 0.0),
    "itc-smooth": (False, 0.1),
    "itc-ids": (True, 0.0),
    "itc-ids-smooth": (True, 0.1),
}
MATCHING = {"itm": IDS, "itm-one-image": torch.zeros_like(IDS)}

Values = dict[str, Tensor]


class Model(nn.Module):
    """Patches and a text vector per pair; all that the objectives take comes from them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 3)
        self.image = nn.Linear(3, QUERIES * EMBED)
        self.text = nn.Linear(4, EMBED)
        self.verdict = nn.Bilinear(3, 4, 2)
        self.hidden = nn.Linear(4, 7)
        self.words = nn.Linear(7, VOCAB)
        self.temperature = nn.Parameter(torch.tensor([0.3]))

    def embed(self, rows: Values) -> tuple[Tensor, Tensor]:
        image = self.image(self.patches(rows["pixels"]).mean(dim=1)).unflatten(1, (QUERIES, EMBED))
        return nn.functional.normalize(image, dim=-1), nn.functional.normalize(
            self.text(rows["texts"]), dim=-1
        )

    def judge(self, patches: Tensor, texts: Tensor) -> Tensor:
        logits: Tensor = self.verdict(patches.tanh().mean(dim=1), texts)
        return logits


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def make_batch() -> Values:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "pixels": normal(PAIRS, PATCHES, 4),
        "texts": normal(PAIRS, 4),
        "tokens": normal(PAIRS, LENGTH, 4),
        "words": torch.randint(0, VOCAB, (PAIRS, LENGTH), generator=generator),
        "mask": torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None],
        "ids": IDS,
        "amounts": normal(PAIRS),
        "counts": torch.tensor([0, 0, 0, 0, 1, 5, 2, 0, 3, 1, 1, 4]),
    }


def contrastive(model: Model, rows: Values, case: str, group: Any = None) -> Values:
    with_ids, smoothing = CONTRASTIVE[case]
    result = image_text_contrastive(
        *model.embed(rows), model.temperature, ids_B=rows["ids"] if with_ids else None,
        label_smoothing=smoothing, group=group,
    )  # fmt: skip
    return {"loss": result.loss, "i2t": result.image_to_text_BN, "t2i": result.text_to_image_BN}


def matching(model: Model, rows: Values, case: str, group: Any = None) -> Values:
    """As the first stage does it: an image for each text, a text for each image."""
    first = rank(group) * len(rows["ids"])
    ids = MATCHING[case][first : first + len(rows["ids"])]
    result = image_text_contrastive(*model.embed(rows), model.temperature, group=group)
    text, image = (
        sample_hard_negatives(logits, ids, seed=SEED + side, group=group)
        for side, logits in enumerate((result.image_to_text_BN, result.text_to_image_BN))
    )
    patches, texts = model.patches(rows["pixels"]), rows["texts"]
    other_patches = fetch_rows(patches, image.index_B, group)
    other_texts = fetch_rows(texts, text.index_B, group)
    logits = model.judge(
        torch.cat([patches, other_patches, patches]), torch.cat([texts, texts, other_texts])
    )
    labels = torch.arange(3).repeat_interleave(len(ids)) == 0
    valid = torch.cat([torch.ones_like(text.valid_B), image.valid_B, text.valid_B])
    loss = image_text_matching(logits, labels.long(), valid, group=group)
    indices = {"text": text.index_B, "image": image.index_B}
    return {"loss": loss, "valid": valid.view(3, -1).T.contiguous(), **indices}


def generation(model: Model, rows: Values, case: str, group: Any = None) -> Values:
    num_targets = int(rows["mask"][:, 1:].sum()) if case == "itg-counted" else None
    loss = grounded_generation(
        model.hidden(rows["tokens"]), model.words, rows["words"], rows["mask"],
        num_targets=num_targets, group=group,
    )  # fmt: skip
    return {"loss": loss}


def mean(model: Model, rows: Values, case: str, group: Any = None) -> Values:
    total = (model.temperature * rows["amounts"] * rows["counts"]).sum()
    return {"loss": global_mean(total, rows["counts"].sum(), group)}


CASES: dict[str, Callable[..., Values]] = {
    **dict.fromkeys(CONTRASTIVE, contrastive),
    **dict.fromkeys(MATCHING, matching),
    "itg": generation,
    "itg-counted": generation,
    "mean": mean,
}


def run_case(case: str, group: Any = None) -> Values:
    """Loss and gradients averaged over the ranks as DDP averages them; other values joined."""
    model, world = make_model(), world_size(group)
    rows = {key: value.chunk(world)[rank(group)] for key, value in make_batch().items()}
    values = CASES[case](model, rows, case, group)
    values["loss"].backward()
    found = {"loss": values.pop("loss").detach()} | gradients(model)
    if world > 1:
        for value in found.values():
            dist.all_reduce(value, group=group)
            value /= world
    return found | {key: gather_with_grad(value.detach(), group) for key, value in values.items()}


def gradients(model: nn.Module) -> Values:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def written_out(case: str, drawn: Values) -> Values:
    """The loss of the whole batch with loops; `drawn` are the negatives of the package."""
    model, batch = make_model(), make_batch()
    if case in CONTRASTIVE:
        loss = written_out_contrastive(model, batch, *CONTRASTIVE[case])
    elif case in MATCHING:
        loss = written_out_matching(model, batch, drawn)
    elif case == "mean":
        amounts, counts = batch["amounts"].tolist(), batch["counts"].tolist()
        weighed = sum(a * c for a, c in zip(amounts, counts, strict=True))
        loss = (model.temperature * weighed / sum(counts)).sum()
    else:
        loss = written_out_generation(model, batch)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def written_out_contrastive(
    model: Model, batch: Values, with_ids: bool, smoothing: float
) -> Tensor:
    image, text = model.embed(batch)
    ids = IDS if with_ids else torch.arange(PAIRS)
    similarity = torch.stack(
        [torch.stack([max(image[i] @ text[t]) for t in range(PAIRS)]) for i in range(PAIRS)]
    )
    total = 0.0
    for logits in (similarity / model.temperature, similarity.T / model.temperature):
        for row in range(PAIRS):
            same = (ids == ids[row]).double()
            target = (1 - smoothing) * same / same.sum() + smoothing / PAIRS
            total = total - (target * torch.log(logits[row].exp() / logits[row].exp().sum())).sum()
    assert isinstance(total, Tensor)
    return total / (2 * PAIRS)


def written_out_matching(model: Model, batch: Values, drawn: Values) -> Tensor:
    patches, texts = model.patches(batch["pixels"]), batch["texts"]
    losses = []
    for pair in range(PAIRS):
        for image, text, label, valid in (
            (pair, pair, 1, True),
            (int(drawn["image"][pair]), pair, 0, drawn["valid"][pair, 1]),
            (pair, int(drawn["text"][pair]), 0, drawn["valid"][pair, 2]),
        ):
            if valid:
                logits = model.judge(patches[image : image + 1], texts[text : text + 1])[0]
                losses.append(torch.log(logits.exp().sum()) - logits[label])
    return torch.stack(losses).mean()


def written_out_generation(model: Model, batch: Values) -> Tensor:
    losses = []
    for tokens, words, length in zip(batch["tokens"], batch["words"], LENGTHS, strict=True):
        for place in range(length - 1):
            scores = model.words(model.hidden(tokens[place])).log_softmax(dim=0)
            losses.append(-0.9 * scores[words[place + 1]] - 0.1 * scores.mean())
    return torch.stack(losses).mean()


def fetched(wanted: Callable[[int, int], list[int]]) -> dict[str, Any]:
    """Rows that each rank gets, and the gradient of each row at its home."""
    world, me = world_size(), rank()
    rows_NPC = make_batch()["pixels"]
    mine = rows_NPC.chunk(world)[me].clone().requires_grad_()
    got = fetch_rows(mine, torch.tensor(wanted(me, world), dtype=torch.int64))
    weight = torch.arange(1.0, 1 + got.numel(), dtype=got.dtype).view_as(got) * (me + 1)
    (got * weight).sum().backward()
    assert mine.grad is not None
    return {"got": gather_with_grad(got.detach()), "grad": gather_with_grad(mine.grad)}


WANTED: dict[str, Callable[[int, int], list[int]]] = {
    "mixed": lambda me, world: [(5 * k + 3 * me + 1) % PAIRS for k in range(7)],
    "repeated": lambda me, world: [me, 11, 11, 0, me, 11],
    "own": lambda me, world: [PAIRS // world * me] * 2,
    "one": lambda me, world: [PAIRS - 1 - me],
}


def traffic() -> dict[str, int]:
    """Bytes that arrive from other ranks, forward and backward, for B features of B pairs."""
    counted = {"bytes": 0}
    exchange, gather, scatter = (
        dist.all_to_all_single, dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    )  # fmt: skip

    def from_others(share: int, tensor: Tensor) -> None:
        counted["bytes"] += share * tensor.element_size()

    def count_exchange(out: Tensor, x: Tensor, received: Any, sent: Any, **kwargs: Any) -> Any:
        foreign = sum(received) - received[rank()]
        from_others(foreign * out[0].numel() if len(out) else 0, out)
        return exchange(out, x, received, sent, **kwargs)

    def count_gather(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        from_others(out.numel() - x.numel(), out)
        return gather(out, x, **kwargs)

    def count_scatter(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        from_others(x.numel() - out.numel(), out)
        return scatter(out, x, **kwargs)

    dist.all_to_all_single = count_exchange
    dist.all_gather_into_tensor = count_gather
    dist.reduce_scatter_tensor = count_scatter
    local = PAIRS // world_size()
    patches = torch.randn(local, 257, 64).requires_grad_()
    logits, ids = torch.zeros(local, PAIRS), torch.arange(local) + local * rank()
    index_B = sample_hard_negatives(logits, ids, seed=SEED).index_B
    result = {"row": patches[0].numel() * patches.element_size(), "wanted": len(index_B)}
    result["foreign"] = int((index_B // local != rank()).sum())
    for name, call in (
        ("fetch", lambda: fetch_rows(patches, index_B)),
        ("gather", lambda: gather_with_grad(patches)),
    ):
        for direction in ("", "_backward"):
            counted["bytes"] = 0
            if not direction:
                rows = call()
            else:
                rows.sum().backward()
            result[name + direction] = counted["bytes"]
    dist.all_to_all_single, dist.all_gather_into_tensor, dist.reduce_scatter_tensor = (
        exchange, gather, scatter
    )  # fmt: skip
    return result


def run_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results: dict[str, Any] = {case: run_case(case) for case in CASES}
    results |= {f"fetch-{name}": fetched(wanted) for name, wanted in WANTED.items()}
    results["traffic"] = [{}] * world
    dist.all_gather_object(results["traffic"], traffic())
    if world == 4:
        # Two groups of two, each with a whole batch to itself.
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for case in ("itc-ids-smooth", "itm", "itg"):
            results[f"{case}-group"] = run_case(case, groups[rank // 2])
    # The last rank, because in the group case it is not a member of the first group.
    if rank == world - 1:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


def main(out: str) -> None:
    torch.set_num_threads(1)
    results: dict[int, Any] = {1: {case: run_case(case) for case in CASES}}
    results[0] = {case: written_out(case, values) for case, values in results[1].items()}
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
