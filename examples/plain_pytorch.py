"""Use an exported bridge with nothing but PyTorch, and carry it over to another encoder.

    python examples/plain_pytorch.py FOLDER

FOLDER is what `latentmodal export RUN --bridge` wrote. The bridge stays as it is. A linear map in
front of it learns to make another encoder's features read like those the bridge was trained on;
here the other encoder is a random rotation of them, so a perfect map exists.
"""

import sys

import torch
from torch import nn

from latentmodal.bridges import Bridge, load


def main(folder: str, steps: int = 300) -> None:
    torch.manual_seed(0)
    bridge = load(folder).eval().requires_grad_(False)
    assert isinstance(bridge, Bridge), f"{folder} holds a {type(bridge).__name__}"
    patches, width = bridge.config.input_tokens or 16, bridge.in_dim
    rotation = torch.linalg.qr(torch.randn(width, width)).Q

    features = torch.randn(4, patches, width)
    print(f"{type(bridge).__name__}: {tuple(features.shape)} -> {tuple(bridge(features).shape)}")

    stitch = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(stitch.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps + 1):
        features = torch.randn(16, patches, width)
        stitched = stitch(features @ rotation)
        if step % (steps // 3) == 0:
            wanted = bridge(features)
            missed = (bridge(stitched) - wanted).square().mean() / wanted.var(dim=0).mean()
            print(f"step {step:4d}: {missed:.4f} of the tokens' variance is missed")
        optimizer.zero_grad()
        nn.functional.mse_loss(stitched, features).backward()
        optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
