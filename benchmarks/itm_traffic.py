"""Hard negatives over ranks: bytes that reach a rank, ours against a gather of all features.

    python benchmarks/itm_traffic.py --ranks 2 --batch 16

Matching needs one wrong image per text, on whichever rank it lies. LAVIS gathers the patch features
of all ranks, with gradient, and takes the few it drew; ours (`fetch_rows`) sends only those. Both
run here on gloo, forward and backward, and must give equal rows and gradients.

"shapes" is what the tensors make: (W - 1) * B rows for a gather, those drawn on other ranks for a
fetch. "wire" is what the kernel says this process' own TCP connections received meanwhile, which
other programs cannot disturb (Linux only). Both are means over the ranks. The gather compared with
is this project's, whose backward is a reduce-scatter; LAVIS' is an all-reduce, about twice that,
and so is gloo's reduce-scatter on the wire. Texts are left out: they are small, and LAVIS gathers
them too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import print_json

from latentmodal.bridges.distributed import fetch_rows, gather_with_grad, rank, world_size
from latentmodal.bridges.losses import sample_hard_negatives

MIB = 2**20
RECEIVED = 128  # offset of `tcpi_bytes_received` in Linux's `struct tcp_info`


class Job(NamedTuple):
    """What every rank does."""

    ranks: int
    batch: int
    tokens: int
    width: int
    folder: str


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="pairs of each rank")
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--width", type=int, default=1408)
    args = parser.parse_args()
    if args.ranks < 2 or args.batch < 1:
        parser.error("--ranks must be at least 2 and --batch at least 1")
    return args


def received_bytes() -> int | None:
    """Bytes that all TCP connections of this process have received; None where nobody tells."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    return sum(
        struct.unpack_from(
            "Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), RECEIVED
        )[0]
        for connection in tcp_connections()
    )


def tcp_connections() -> Iterator[socket.socket]:
    """This process' own, whoever opened them."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            copy = os.dup(int(link.name))
        except OSError:  # closed since it was listed, as is the listing itself
            continue
        with socket.socket(fileno=copy) as found:
            internet = found.family in (socket.AF_INET, socket.AF_INET6)
            if internet and found.type == socket.SOCK_STREAM:
                yield found


def run_rank(index: int, job: Job) -> None:
    """Measure both ways on one rank; the first writes down what all found."""
    torch.set_num_threads(1)
    store = f"file://{job.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=job.ranks)
    generator = torch.Generator().manual_seed(index)
    features_BNF = torch.randn(job.batch, job.tokens, job.width, generator=generator)
    total = job.ranks * job.batch
    own_B = torch.arange(job.batch) + job.batch * rank()
    drawn_B = sample_hard_negatives(torch.zeros(job.batch, total), own_B, seed=0).index_B
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "gather": lambda x: gather_with_grad(x).index_select(0, drawn_B),
        "fetch": lambda x: fetch_rows(x, drawn_B),
    }
    # Connections are made at the first use of a collective, and are no part of its traffic.
    for way in ways.values():
        way(torch.zeros(job.batch, 1, requires_grad=True)).sum().backward()
    counted: dict[str, Any] = {}
    rows, grads = {}, {}
    for name, way in ways.items():
        inputs = features_BNF.clone().requires_grad_()
        forward, rows[name] = counting(partial(way, inputs))
        backward, _ = counting((rows[name] ** 2).sum().backward)
        grads[name] = inputs.grad
        counted[name] = {"forward": forward, "backward": backward}
    assert torch.equal(rows["fetch"], rows["gather"]), "the two ways bring different rows"
    torch.testing.assert_close(grads["fetch"], grads["gather"])
    counted["foreign"] = int((drawn_B // job.batch != rank()).sum())
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, counted)
    if index == 0:
        Path(job.folder, "counted.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def counting(action: Callable[[], Any]) -> tuple[int | None, Any]:
    """Bytes received while all ranks do this, and its result."""
    dist.barrier()
    before = received_bytes()
    result = action()
    dist.barrier()
    after = received_bytes()
    return None if before is None or after is None else after - before, result


def summarise(everyone: list[dict[str, Any]], job: Job) -> dict[str, dict[str, float | None]]:
    """Means over the ranks, in bytes, of each way."""
    row = 4 * job.tokens * job.width
    foreign = statistics.mean(counted["foreign"] for counted in everyone)
    # A rank gets as many gradients home as rows were fetched from it: the same, over all ranks.
    rows = {"gather": (job.ranks - 1) * job.batch, "fetch": foreign}
    result: dict[str, dict[str, float | None]] = {}
    for name in ("gather", "fetch"):
        result[name] = {"shapes": 2 * row * rows[name]}
        for direction in ("forward", "backward"):
            values = [counted[name][direction] for counted in everyone]
            result[name][direction] = None if None in values else statistics.mean(values)
    return result


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(args.ranks, args.batch, args.tokens, args.width, folder)
        mp.start_processes(run_rank, (job,), nprocs=args.ranks, start_method="spawn")
        result = summarise(json.loads(Path(folder, "counted.json").read_text()), job)
    table = Table(title=f"{args.ranks} ranks of {args.batch} pairs, {args.tokens} x {args.width}")
    for column in ("MiB per rank", "shapes", "wire, forward", "wire, backward"):
        table.add_column(column, justify="left" if column.startswith("MiB") else "right")
    for name, values in result.items():
        table.add_row(name, *("" if v is None else f"{v / MIB:.2f}" for v in values.values()))
    Console(width=100).print(table)
    print_json("itm_traffic", "cpu", **vars(args), results=result)


if __name__ == "__main__":
    main()
