"""Running a recipe's evaluation tasks: during training, at its end, and by `latentmodal eval`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation import tensorboard as views
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.experiments.evaluation.tasks import EmbeddedSet, EvaluationConfig, embed_set
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.checkpoints import read_checkpoint, step_of
from latentmodal.experiments.training.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass
class Evaluator:
    """Evaluates one system on a recipe's tasks and shows it in TensorBoard.

    `run` is a collective operation: every rank calls it; only rank 0, which has the writer, writes.
    """

    config: EvaluationConfig
    system: Any
    context: dict[str, str | int | float | None]
    writer: SummaryWriter | None = None

    def run(self, step: int, *, projector: bool = False) -> EvalReport:
        """All tasks at `step`; the projector once at the end: TensorBoard opens its oldest step."""
        sets: dict[str, EmbeddedSet] = {}
        sections, confusions = {}, {}
        for name, task in self.config.tasks.items():
            data = self._embedded(task.source, sets)
            sections[name], confused = task.run(self.system, data)
            if confused:
                confusions[name] = confused
        report = EvalReport(
            sections=sections, context={**self.context, "step": step}, confusions=confusions
        )
        shown = self.config.views or next(iter(self.config.tasks), None)
        if self.writer is not None:
            report.log(self.writer, step)
        if shown is not None:
            data = sets[repr(self.config.tasks[shown].source)]
            self._show(data, shown, step, projector)
        return report

    def _embedded(self, source: Any, sets: dict[str, EmbeddedSet]) -> EmbeddedSet:
        key = repr(source)
        if key not in sets:
            loader = LoaderConfig(batch_size=self.config.batch_size, workers=self.config.workers)
            preprocess = self.system.model.image_encoder.preprocess
            sets[key] = embed_set(self.system, source, preprocess, loader, self.system.device)
        return sets[key]

    def _show(self, data: EmbeddedSet, split: str, step: int, projector: bool) -> None:
        captions = [texts[0] for texts in data.captions[: len(data.pixels)]]
        text_NE = self.system.embed_captions(captions)
        if self.writer is None:
            return
        images, image_NE = data.pixels, data.image_NE[: len(data.pixels)]
        views.similarity_matrix(self.writer, images, captions, image_NE, text_NE, step)
        owner_N = torch.arange(len(captions))
        views.retrieved_examples(self.writer, images, captions, image_NE, text_NE, owner_N, step)
        if projector:
            splits = [split] * len(captions)
            views.embedding_projector(
                self.writer, images, captions, image_NE, text_NE, splits, step
            )
        self.writer.flush()


def load_system(run: RunFolder, checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """The trained system of a run and its recipe, on one device, in eval mode.

    Raises:
        UserError: no run, no intact checkpoint, or other frozen weights than it was trained with.
    """
    from latentmodal.experiments.training.fit import build_system

    run.recipe()
    recipe = load_recipe(str(run.recipe_file), overrides)
    system = build_system(recipe, run)
    state = read_checkpoint(checkpoint)
    system.on_load_checkpoint(state)
    try:
        result = system.load_state_dict(state["state_dict"], strict=False)
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise UserError(f"{checkpoint}: is of another recipe; {reason}") from error
    frozen = {name for name, p in system.named_parameters() if not p.requires_grad}
    if lacking := [name for name in result.missing_keys if name not in frozen]:
        raise UserError(f"{checkpoint}: lacks {', '.join(lacking[:3])}; it is of another recipe")
    if strange := result.unexpected_keys:
        raise UserError(f"{checkpoint}: holds {', '.join(strange[:3])}; it is of another recipe")
    device = "cuda" if torch.cuda.is_available() and recipe.trainer.accelerator != "cpu" else "cpu"
    return system.to(device).eval(), recipe


def evaluate_run(folder: Path, overrides: Sequence[str], console: Console) -> EvalReport:
    """Evaluate a run's newest checkpoint: `eval.json`, a table, TensorBoard scalars and views."""
    if strange := [key for key in overrides if not key.startswith("evaluation.")]:
        raise UserError(
            f"{strange[0]}: only keys under evaluation. can be changed for a trained run"
        )
    run = RunFolder(folder)
    run.recipe()
    checkpoint = run.checkpoint()
    system, recipe = load_system(run, checkpoint, overrides)
    if not recipe.evaluation.tasks:
        raise UserError(f"{run.recipe_file}: evaluation.tasks is empty; name at least one task")
    writer = SummaryWriter(str(run.logs))
    context: dict[str, Any] = {"recipe": recipe.name, "seed": recipe.seed}
    evaluator = Evaluator(recipe.evaluation, system, context, writer)
    report = evaluator.run(step_of(checkpoint), projector=True)
    writer.close()
    report.write_json(run.path / "eval.json")
    console.print(report.table())
    console.print(f"written to {run.path / 'eval.json'}")
    return report
