"""From a recipe to a trained, evaluated run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from latentmodal.encoders import Tokenizer, WordTokenizerConfig, train_word_tokenizer
from latentmodal.experiments.data.loader import TrainLoader, open_sources
from latentmodal.experiments.data.module import resolve_source, training_captions
from latentmodal.experiments.data.seeding import derive_seed
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.experiments.evaluation.run import Evaluator
from latentmodal.experiments.evaluation.tensorboard import recipe_text
from latentmodal.experiments.feature_cache.opening import open_features
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.recipe import to_yaml
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.training.callbacks import (
    Checkpoints,
    Evaluate,
    PlainProgress,
    Progress,
    Throughput,
)
from latentmodal.experiments.training.checkpoints import latest_checkpoint, step_of
from latentmodal.experiments.training.cost import CostMeter
from latentmodal.experiments.training.freeze import FreezePlan, freeze_rows, freeze_table
from latentmodal.experiments.training.layer_decay import layer_multipliers
from latentmodal.experiments.training.rng import ExactRandomness
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.experiments.training.strategies import build_strategy

log = logging.getLogger(__name__)


def fit(recipe: Recipe, *, resume: bool, console: Console) -> Path:
    """Train `recipe` (or go on with it), evaluate the result, and say where to look.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder is taken, the data are unusable, the loss is not finite, …
    """
    run = RunFolder(Path(recipe.folder))
    first = process_rank(recipe.trainer.devices) == 0
    checkpoint = run.open(recipe, resume) if first else latest_checkpoint(run.checkpoints)
    _quiet_lightning()
    pl.seed_everything(recipe.seed, workers=True, verbose=False)
    system = build_system(recipe, run)
    if first:
        scales = layer_multipliers(system.model, recipe.optim.layer_decay)
        rows = freeze_rows(system.model, system.plan, recipe.optim.lr, layer_scale=scales)
        console.print(freeze_table(rows))
    if run.finished_file.exists():
        console.print(f"{run.path} is already trained to its last step")
        _show(run, recipe, EvalReport.read_json(run.path / "eval.json"), console)
        return run.path
    _check_evaluation_sources(recipe)
    # Ranks must agree on the initial weights, and differ in dropout from here on.
    rank = process_rank(recipe.trainer.devices)
    torch.manual_seed(derive_seed(recipe.seed, "rank", rank))
    loader = _train_loader(recipe, system)
    logger = TensorBoardLogger(
        str(run.path),
        name=run.logs.name,
        version="",
        default_hp_metric=False,
        # Points past the checkpoint will come again.
        purge_step=step_of(checkpoint) + 1 if checkpoint else None,
    )
    context: dict[str, Any] = {"recipe": recipe.name, "seed": recipe.seed}
    evaluator = Evaluator(recipe.evaluation, system, context, folder=run.path)
    meter = CostMeter()
    try:
        trainer = _trainer(recipe, run, loader, logger, evaluator, meter, console)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error
    if first:
        recipe_text(logger.experiment, to_yaml(recipe))
    if checkpoint is not None and first:
        console.print(f"going on from {checkpoint}")
    try:
        trainer.fit(system, loader, ckpt_path=str(checkpoint) if checkpoint else None)
    except SIGTERMException:
        log.warning("stopped by SIGTERM at step %d; go on with resume=true", trainer.global_step)
        raise SystemExit(128 + signal.SIGTERM) from None
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    finally:
        loader.close()
    if trainer.global_step < recipe.trainer.max_steps:
        raise UserError(f"stopped at step {trainer.global_step}; go on with resume=true")
    if recipe.trainer.parallelism != "fsdp":
        system.to(trainer.strategy.root_device)  # teardown moved it to the CPU
    system.eval()
    evaluator.writer = logger.experiment if trainer.is_global_zero else None
    report = evaluator.run(trainer.global_step, last=True)
    system.finish(run.path)
    if trainer.is_global_zero:
        report.write_json(run.path / "eval.json")
        meter.cost(trainer, system.model).write(run.cost_file)
        write_text_atomically(run.finished_file, json.dumps({"step": trainer.global_step}) + "\n")
        logger.finalize("success")
        _show(run, recipe, report, console)
    trainer.strategy.barrier()
    return run.path


def process_rank(devices: int) -> int:
    """This process's global rank, known before the process group is up.

    torchrun and SLURM state it; Lightning's own launcher states node and local rank.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    node, local = os.environ.get("NODE_RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    return int(node) * devices + int(local)


def build_tokenizer(recipe: Recipe, run: RunFolder) -> Tokenizer | None:
    """The recipe's tokenizer; `path: auto` learns a vocabulary from the training captions, once.

    None where the system reads text through a language model, which brings its own.
    """
    config = getattr(recipe.system, "tokenizer", None)
    if config is None:
        return None
    if isinstance(config, WordTokenizerConfig) and config.path == "auto":
        if not run.tokenizer_file.exists():
            captions = (text for source in recipe.data.train for text in training_captions(source))
            part = run.tokenizer_file.with_suffix(f".part{os.getpid()}")
            train_word_tokenizer(captions, part, recipe.system.vocab_limit)
            part.replace(run.tokenizer_file)
        config = dataclasses.replace(config, path=str(run.tokenizer_file))
    try:
        return config.build()
    except OSError as error:
        raise UserError(
            f"system.tokenizer: {getattr(config, 'model', '')} could not be loaded "
            f"({str(error).splitlines()[0]}); give a local folder or go online once"
        ) from error
    except ValueError as error:
        raise UserError(f"system.tokenizer: {error}") from error


def build_system(recipe: Recipe, run: RunFolder) -> Any:
    """The LightningModule a recipe describes, with its tokenizer."""
    tokenizer = build_tokenizer(recipe, run)
    try:
        system = recipe.system.build(
            FreezePlan(recipe.freeze), recipe.optim, recipe.trainer, tokenizer
        )
        system.seed, system.clean = recipe.seed, recipe.data.loader.clean
        layer_multipliers(system.model, recipe.optim.layer_decay)  # a wrong pattern stops here
    except ValueError as error:
        raise UserError(f"{run.recipe_file}: {error}") from error
    return system


def _check_evaluation_sources(recipe: Recipe) -> None:
    """Find a missing evaluation shard now rather than at the first evaluation."""
    for name, task in recipe.evaluation.tasks.items():
        try:
            open_sources([resolve_source(task.source)])
        except ValueError as error:
            raise UserError(f"evaluation.tasks.{name}.source: {error}") from error


def _train_loader(recipe: Recipe, system: Any) -> TrainLoader:
    config = recipe.trainer
    return TrainLoader(
        [resolve_source(source) for source in recipe.data.train],
        recipe.data.loader,
        steps=config.max_steps,
        seed=recipe.seed,
        image_transform=system.image_transform(recipe.data.augment),
        text_transform=system.text_transform,
        prompt_transform=system.prompt_transform,
        features=open_features(recipe, system),
        rank=process_rank(config.devices),
        world_size=config.world_size,
    )


def _trainer(
    recipe: Recipe,
    run: RunFolder,
    loader: TrainLoader,
    logger: TensorBoardLogger,
    evaluator: Evaluator,
    meter: CostMeter,
    console: Console,
) -> pl.Trainer:
    config = recipe.trainer

    def evaluate(step: int) -> None:
        began = time.perf_counter()
        first = process_rank(config.devices) == 0
        if first:
            evaluator.writer = logger.experiment
        report = evaluator.run(step)
        if first:
            report.write_json(run.evaluation_file(step))
        meter.pause(time.perf_counter() - began)

    callbacks: list[pl.Callback] = [
        meter,  # first, so that a checkpoint holds the step it is of
        ExactRandomness(),
        Throughput(loader, config.log_every),
        Checkpoints(run.checkpoints, config.checkpoint_every, config.keep_checkpoints),
        Progress() if console.is_terminal else PlainProgress(),
    ]
    if recipe.evaluation.tasks:
        callbacks.append(Evaluate(evaluate, config.eval_every, recipe.evaluation.at_start))
    autocast = config.precision == "bf16" and config.parallelism != "fsdp"
    return pl.Trainer(
        max_steps=config.max_steps,
        max_epochs=-1,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=build_strategy(config),
        precision="bf16-mixed" if autocast else "32-true",  # fsdp brings a policy of its own
        gradient_clip_val=recipe.optim.grad_clip,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=config.log_every,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=console.is_terminal,
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
    )


def _show(run: RunFolder, recipe: Recipe, report: EvalReport, console: Console) -> None:
    if report.sections:
        console.print(report.table())
    console.print(f"run         {run.path}")
    console.print(f"TensorBoard tensorboard --logdir {run.path.parent.parent}")


def _quiet_lightning() -> None:
    """Keep what a user can act on; drop hardware adverts and notes about our own choices."""
    disable_progress_bar()  # of transformers loading weights
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*IterableDataset.*__len__.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",  # the last step is logged in any case
        ".*weights_only.*",
        ".*set_vital.*",
        ".*returned a view tensor.*",  # keys and values by head; nothing writes into them
        ".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
