"""The sigmoid loss alone: bytes autograd keeps for the backward pass, and time, ours and theirs.

    python benchmarks/sigmoid_memory.py --batch 2048 --width 512 --pairs 21

One process, no ranks. Ours takes the gradients in the forward pass and keeps only those (see
`latentmodal.bridges.losses.sigmoid`); open_clip's keeps matrices of all pairs. The sides take
turns; "speed" is the median of (open_clip's seconds / ours), forward and backward together.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from memory import kept_bytes
from open_clip.loss import SigLipLoss
from torch import Tensor
from turns import Summary, print_json

from latentmodal.bridges.losses import sigmoid_loss


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=21, help="at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def seconds(loss: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Forward and backward."""
    for x in inputs:
        x.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(*inputs).backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Checks that both agree, measures, prints two lines and one of JSON."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [F.normalize(torch.randn(args.batch, args.width), dim=-1) for _ in range(2)]
    scalars = [torch.tensor([10.0]), torch.tensor([-10.0])]
    inputs = [x.to(args.device).requires_grad_() for x in (*rows, *scalars)]
    sides: dict[str, Callable[..., Tensor]] = {"open_clip": SigLipLoss(), "ours": sigmoid_loss}
    grads = {name: torch.autograd.grad(loss(*inputs).sum(), inputs) for name, loss in sides.items()}
    for ours, theirs in zip(grads["ours"], grads["open_clip"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
    kept = {name: kept_bytes(partial(loss, *inputs), inputs) for name, loss in sides.items()}
    ratios = []
    for turn in range(args.pairs + 2):
        order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        times = {name: seconds(sides[name], inputs) for name in order}
        if turn >= 2:  # warm
            ratios.append(times["open_clip"] / times["ours"])
    speed = Summary.of(ratios)
    print(f"{args.batch} x {args.batch} pairs of width {args.width}")
    print("kept for backward: " + ", ".join(f"{n} {b / 2**20:.1f} MiB" for n, b in kept.items()))
    print(f"speed {speed.median:.2f}, IQR {speed.low:.2f} to {speed.high:.2f}")
    print_json(
        "sigmoid_memory",
        args.device,
        **{k: v for k, v in vars(args).items() if k != "device"},
        kept_bytes=kept,
        speed=speed.median,
        iqr=[speed.low, speed.high],
    )


if __name__ == "__main__":
    main()
