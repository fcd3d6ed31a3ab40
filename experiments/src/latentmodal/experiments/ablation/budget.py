"""An equal budget, as the number of steps of each cell.

Every measure becomes `trainer.max_steps` before a cell begins, so that its learning-rate schedule
ends where training does, and so that a run that was killed goes on to the same end:

- steps: as they are.
- samples: divided by the global batch size.
- tokens: divided by the tokens of a step, counted in real batches as `CostMeter` counts them: soft
  tokens and text, no padding.
- flops: divided by the floating-point operations of a forward and a backward pass on a real batch.
- seconds: divided by the measured time of a step that nothing else disturbs. It is computing time:
  evaluation and waiting for data are left out, and workers that share cores take longer.

Steps are whole: a cell gets the number of them that comes nearest to the budget.
"""

from __future__ import annotations

from latentmodal.experiments.ablation.config import BudgetConfig
from latentmodal.experiments.ablation.costs import CellCost
from latentmodal.experiments.errors import UserError


def steps_for(budget: BudgetConfig, cost: CellCost, label: str) -> int:
    """How many steps the cell `label`, of this cost, is given.

    Raises:
        UserError: the cell reads no tokens, or one step is more than the budget.
    """
    step = cost_of_step(budget, cost)
    steps = round(budget.amount / step)
    if steps < 1:
        raise UserError(
            f"budget.{budget.measure}: {budget.amount:g} is less than half a step of cell {label}, "
            f"which takes {step:g}; give more"
        )
    return steps


def cost_of_step(budget: BudgetConfig, cost: CellCost) -> float:
    """What one step takes of the budget.

    Raises:
        UserError: a budget in tokens, and a system without a language model that reads them.
    """
    if budget.measure == "steps":
        return 1.0
    if budget.measure == "samples":
        return float(cost.samples_per_step)
    if budget.measure == "seconds":
        return cost.step_seconds
    if budget.measure == "flops":
        return float(cost.flops_per_step)
    if not cost.tokens_per_step:
        raise UserError(
            "budget.tokens: this system has no language model whose tokens could be counted; "
            "use samples, steps, seconds or flops"
        )
    return cost.tokens_per_step
