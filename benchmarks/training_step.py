"""One side's training step: forward, backward and AdamW, with time and memory of each kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from memory import kept_bytes
from parity import Result
from safetensors.torch import save_file
from torch import Tensor, nn
from turns import Step, Turn, peak_bytes, reset_peak, resident_bytes, timed

from latentmodal.experiments.training.config import OptimConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.experiments.training.optim import build_adamw, parameter_groups

WARM_UP = 2  # AdamW makes its moments in the first step


class Work(NamedTuple):
    """What a side trains."""

    model: nn.Module
    loss: Callable[[], Tensor]
    """The forward pass on the side's own inputs."""
    inputs: tuple[Tensor, ...]


class TrainingStep:
    """All sides get AdamW from the same function, fused, with the same parameters decayed."""

    def __init__(self, work: Work, device: str, plan: FreezePlan | None = None) -> None:
        self.model, self.loss, self.inputs = work
        self.device = torch.device(device)
        self.model.train()
        plan = plan or FreezePlan({})
        plan.apply(self.model)
        config = OptimConfig()
        self.optimizer = build_adamw(parameter_groups(self.model, plan, config), config)
        self.fast = False
        self.at_rest = resident_bytes()

    def named_gradients(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of all parameters, under the names that all sides share."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Whatever is to change between the comparison in fp32 and the steps that are timed."""

    def after_step(self) -> None:
        """Whatever follows the optimiser in every step."""

    def parity(self, path: str) -> Result:
        """The loss in fp32; gradients, under shared names, are written to `path`."""
        loss = self.loss()
        loss.backward()
        own = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        grads = self.named_gradients(own)
        save_file({name: grad.cpu().contiguous() for name, grad in grads.items()}, path)
        self.optimizer.zero_grad()
        value = loss.item()
        del loss, own, grads
        self._leave_room()
        return Result(value, Path(path))

    def begin(self) -> None:
        """Warm up, in the precision that is timed."""
        self.fast = self.device.type == "cuda"
        self.prepare()
        if self.device.type == "cuda":
            self._leave_room()
            torch.cuda.reset_peak_memory_stats()
        reset_peak()
        for _ in range(WARM_UP):
            self.step()

    def turn(self) -> Turn:
        return timed(self.step)

    def step(self) -> Step:
        """One training step; seconds of its three phases."""
        start = self._now()
        loss = self._forward()
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()
        end = self._now()
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "optimiser": end - backward,
        }

    def memory(self) -> int | None:
        """Peak bytes: all of the device's, or on the CPU what training added to the model."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = peak_bytes()
        return None if peak is None or self.at_rest is None else peak - self.at_rest

    def kept(self) -> int:
        """Bytes a forward keeps for the backward, beyond parameters and inputs."""
        there = (*self.model.parameters(), *self.model.buffers(), *self.inputs)
        return kept_bytes(self._forward, there)

    def _leave_room(self) -> None:
        """Give up what the device's allocator holds in reserve: the other sides need room too."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            return self.loss()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
