"""Running a recipe's evaluation tasks: during training, at its end, and by `latentmodal eval`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.bridges import QFormer
from latentmodal.bridges.attention_maps import record_cross_attention
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation import tensorboard as views
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.experiments.evaluation.samples import SAMPLES_FILE, write_samples
from latentmodal.experiments.evaluation.sets import EvaluationSet, has_similarity
from latentmodal.experiments.evaluation.tasks import EvaluationConfig
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.checkpoints import SUFFIX, read_checkpoint, step_of
from latentmodal.experiments.training.freeze import frozen_names
from latentmodal.experiments.training.run_folder import RunFolder

log = logging.getLogger(__name__)

SAMPLES_SHOWN: Final = 12
"""Pictures whose generated captions TensorBoard shows."""

ATTENTION_SHOWN: Final = 4
"""Those of them over which the queries' attention is laid."""


@dataclass
class Evaluator:
    """Evaluates one system on a recipe's tasks and shows it in TensorBoard.

    `run` is a collective operation: every rank calls it; only rank 0, which has the writer, writes.
    The last evaluation leaves what is said of a few pictures in `folder`, where one is given.

    Raises:
        UserError: a task needs what the system has not.
    """

    config: EvaluationConfig
    system: Any
    context: dict[str, str | int | float | None]
    writer: SummaryWriter | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name, task in self.config.tasks.items():
            try:
                task.check(self.system)
            except UserError as error:
                raise UserError(f"evaluation.tasks.{name}: {error}") from error

    def run(self, step: int, *, last: bool = False) -> EvalReport:
        """All tasks at `step`; the `last` time for the projector too, which opens on its oldest."""
        sets = self._sets()
        sections, confusions = {}, {}
        for name, task in self.config.tasks.items():
            sections[name], confused = task.run(self.system, sets[repr(task.source)])
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
            self._show(data, shown, step, last)
        return report

    def _sets(self) -> dict[str, EvaluationSet]:
        """One set per source; nothing is read yet."""
        loader = LoaderConfig(batch_size=self.config.batch_size, workers=self.config.workers)
        tasks = list(self.config.tasks.values())
        featured = {repr(task.source) for task in tasks if task.reads_features}
        return {
            key: EvaluationSet(self.system, source, loader, keep_features=key in featured)
            for key, source in {repr(task.source): task.source for task in tasks}.items()
        }

    def _show(self, data: EvaluationSet, split: str, step: int, last: bool) -> None:
        pixels = data.samples.pixels
        captions = [(*texts, "")[0] for texts in data.samples.captions[: len(pixels)]]
        self._show_samples(pixels, data.samples.captions, step, last)
        if data.is_embedded and has_similarity(self.system):
            self._show_space(data, captions, split, step, last)
        if self.writer is not None:
            self.writer.flush()

    def _show_samples(
        self, pixels: list[Tensor], captions: list[list[str]], step: int, last: bool
    ) -> None:
        """What the model says of a few pictures, and where its queries look meanwhile."""
        rows = views.spread(len(pixels), SAMPLES_SHOWN)
        shown = [pixels[row] for row in rows]
        bridge, said = getattr(self.system.model, "bridge", None), None
        # The model's own methods run the bridge: under FSDP its weights are there only then.
        with ExitStack() as stack:
            maps: list[Tensor] = []
            if isinstance(bridge, QFormer):
                maps = stack.enter_context(record_cross_attention(bridge))
            pixels_BCHW = torch.stack(shown).to(self.system.device)
            if _says_captions(self.system):
                said = self.system.caption_images(pixels_BCHW)
            elif isinstance(bridge, QFormer) and hasattr(self.system, "read_images"):
                self.system.read_images(pixels_BCHW)
        if self.writer is None:
            return
        if said is not None:
            true = [captions[row] for row in rows]
            first = [(*texts, "")[0] for texts in true]
            views.generated_captions(self.writer, shown, first, said, step)
            if last and self.folder is not None:
                write_samples(self.folder / SAMPLES_FILE, shown, true, said)
        if maps:
            few = views.spread(len(rows), ATTENTION_SHOWN)
            mean_BMN = torch.stack(maps).mean(dim=0).cpu()
            views.query_attention(self.writer, [shown[row] for row in few], mean_BMN[few], step)

    def _show_space(
        self, data: EvaluationSet, captions: list[str], split: str, step: int, last: bool
    ) -> None:
        text_NE = self.system.embed_captions(captions)
        if self.writer is None:
            return
        images, image_NE = data.samples.pixels, data.image_NE[: len(captions)]
        views.similarity_matrix(self.writer, images, captions, image_NE, text_NE, step)
        owner_N = torch.arange(len(captions))
        views.retrieved_examples(self.writer, images, captions, image_NE, text_NE, owner_N, step)
        if last:
            splits = [split] * len(captions)
            views.embedding_projector(
                self.writer, images, captions, image_NE, text_NE, splits, step
            )


def _says_captions(system: Any) -> bool:
    """Whether `caption_images` is there and asks nothing that only a sample could answer."""
    if not hasattr(system, "caption_images"):
        return False
    if hasattr(system, "caption_scores"):  # a Q-Former that captions by itself, if trained to
        return system.model.bridge.caption_head is not None
    return bool(system.config.target == "caption")


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
    frozen = frozen_names(system)
    if lacking := [name for name in result.missing_keys if name not in frozen]:
        raise UserError(f"{checkpoint}: lacks {', '.join(lacking[:3])}; it is of another recipe")
    if strange := result.unexpected_keys:
        raise UserError(f"{checkpoint}: holds {', '.join(strange[:3])}; it is of another recipe")
    device = "cuda" if torch.cuda.is_available() and recipe.trainer.accelerator != "cpu" else "cpu"
    return system.to(device).eval(), recipe


def find_checkpoint(source: Path) -> tuple[RunFolder, Path]:
    """The run and the checkpoint that a path means.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it.

    Raises:
        UserError: no run, or no intact checkpoint.
    """
    single = source.suffix == SUFFIX
    run = RunFolder(source.parent.parent if single else source)
    run.recipe()
    return run, source if single else run.checkpoint()


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
    evaluator = Evaluator(recipe.evaluation, system, context, writer, run.path)
    report = evaluator.run(step_of(checkpoint), last=True)
    writer.close()
    report.write_json(run.path / "eval.json")
    console.print(report.table())
    console.print(f"written to {run.path / 'eval.json'}")
    return report
