"""Where parallelism is applied: `single`, `ddp` or `fsdp`, chosen by one key of the recipe.

Model code is single-device throughout. All three strategies save the same file: the trainable
parameters and the optimiser state under their parameter names, so a run may be resumed under
another strategy with the same number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from latentmodal.experiments.training.checkpoints import VerifiedCheckpointIO, read_checkpoint
from latentmodal.experiments.training.config import TrainerConfig
from latentmodal.experiments.training.freeze import frozen_names


class NamedStateMixin(Strategy):
    """State dicts keyed by parameter name, whole and on the CPU, without frozen parameters."""

    _OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # ModelParallelStrategy would restore its own file format instead

    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = get_model_state_dict(self._module(), options=self._OPTIONS)
        frozen = frozen_names(self._module())  # torch forgets the second name of a tied weight
        return {name: value for name, value in state.items() if name not in frozen}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "_optimizer", optimizer)
        return get_optimizer_state_dict(self._module(), inner, options=self._OPTIONS)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load trainable parameters and buffers; frozen parameters are in the model already.

        Raises:
            ValueError: the checkpoint's parameters are not this model's.
        """
        module = self._module()
        wanted, found = set(module.state_dict()), set(checkpoint["state_dict"])
        wanted -= frozen_names(module)
        if wanted != found:
            missing, unknown = sorted(wanted - found)[:3], sorted(found - wanted)[:3]
            raise ValueError(
                f"the checkpoint does not fit this recipe: it lacks {missing or 'nothing'}, "
                f"and holds unknown {unknown or 'nothing'}; resume with its own recipe"
            )
        options = StateDictOptions(full_state_dict=True, strict=False)
        try:
            set_model_state_dict(module, dict(checkpoint["state_dict"]), options=options)
        except RuntimeError as error:  # shapes
            reason = " ".join(str(error).splitlines()[1:2]).strip()
            raise ValueError(f"the checkpoint does not fit this recipe: {reason}") from error

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # Not strict: a parameter that never got a gradient has no state, here or in the file.
        options = StateDictOptions(full_state_dict=True, strict=False)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            inner = getattr(optimizer, "_optimizer", optimizer)
            set_optimizer_state_dict(self._module(), inner, state, options=options)


class SingleDevice(NamedStateMixin, SingleDeviceStrategy):
    """One process, one device."""


class DataParallel(NamedStateMixin, DDPStrategy):
    """Replicated parameters, averaged gradients."""


class FullyShardedDataParallel(NamedStateMixin, ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimiser state sharded over all ranks."""


def build_strategy(config: TrainerConfig) -> Strategy:
    """The Lightning strategy for `config.parallelism`."""
    io = VerifiedCheckpointIO()
    if config.parallelism == "ddp":
        return DataParallel(checkpoint_io=io, gradient_as_bucket_view=True)
    if config.parallelism == "fsdp":
        # Left to itself Lightning makes a node's devices one tensor-parallel group, which would
        # shard nothing and synchronise nothing here.
        strategy = FullyShardedDataParallel(
            data_parallel_size=config.world_size, tensor_parallel_size=1
        )
        strategy.checkpoint_io = io
        return strategy
    device = "cuda:0" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    return SingleDevice(device=torch.device(device), checkpoint_io=io)


def wrap_model(model: nn.Module, config: TrainerConfig, mesh: DeviceMesh | None) -> None:
    """Activation checkpointing, then compilation, then sharding, in place and in that order.

    Args:
        model: declares `fsdp_units`, the classes recomputed and sharded as one piece, and
            `fp32_modules`, submodules that compute in fp32 whatever the precision (a temperature
            of 100 would lose its third digit in bf16), and where it has any `fsdp_parts`,
            submodules sharded apart from the rest because they are frozen or of another dtype.
        mesh: the data-parallel mesh under `fsdp`, else None.
    """
    units: tuple[type[nn.Module], ...] = model.fsdp_units  # type: ignore[assignment]
    precise: tuple[nn.Module, ...] = model.fp32_modules  # type: ignore[assignment]
    parts: tuple[nn.Module, ...] = getattr(model, "fsdp_parts", ())
    if config.activation_checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, units))
    if config.compile:
        model.compile()
    if mesh is None:
        return
    fast = torch.bfloat16 if config.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=fast, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for module in [m for m in model.modules() if isinstance(m, units)]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in precise:
        fully_shard(module, mesh=mesh, mp_policy=exact)
    for module in parts:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # whatever no unit holds belongs to the root
    for module in (model, *parts, *precise):
        for method in getattr(module, "fsdp_forward_methods", ()):
            register_fsdp_forward_method(module, method)
