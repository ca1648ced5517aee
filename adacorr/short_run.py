"""The sampling loop of AdaCorrection alone: whole steps, of which only the blocks of computed ones are the model's.

Every step is the same function of what the stack adds (`adacorr.outside`). Skipped steps up to the next computed one
are taken in one call, and so are those that a computed step takes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from adacorr.outside import Outside
from adacorr.run import put_rows

if TYPE_CHECKING:
    from adacorr.corrected_run import CorrectedRun, Plan

# Most steps that one forecast covers: it holds that many outputs of the stack besides the history.
LOOK_AHEAD = 8


class ShortRun:
    """Takes the steps of a run without a policy and without injected noise, in place of the sampling loop."""

    def __init__(self, run: CorrectedRun, outside: Outside):
        self.run, self.outside = run, outside
        self._walked: tuple[range, Tensor | None] = (range(0), None)  # (s, n, ...) the states after coming steps

    def take(self, x: Tensor) -> Tensor:
        """The state after the step that is open, from the state x before it; (n, K * C, H, W) both."""
        run, (steps, states) = self.run, self._walked
        if run.rewinds is not None:
            run.rewinds.begin(run.step, x)
        if run.step in steps:
            run.skip_step()
            return states[run.step - steps.start]
        plan = run.plan()
        if len(plan.computed.cond):
            return self._compute(x, plan)
        ahead, added = run.forecast()
        steps = range(run.step, max(run.step + 1, min(run.controller.next_due(), ahead.stop)))
        self._walked = steps, self.outside.walk(x, run.step, added[:, :, : len(steps)], run.everyone)
        run.skip_step()
        return self._walked[1][0]

    def _compute(self, x: Tensor, plan: Plan) -> Tensor:
        run = self.run
        computed = run.compute(plan, *self.outside.enter(x, run.step, plan.computed))
        run.learn(plan, computed)
        added = run.added(plan, computed)
        run.finish(plan, computed, None)
        if run.rewinds is not None:
            for again, state, forecasts in run.rewinds.of(run.step, run.offset):
                for first, ahead in forecasts:
                    state = self.outside.walk(state, first, ahead, again)[-1]
                x = put_rows(x, again, state)
        return self.outside.walk(x, run.step, added.unsqueeze(2), run.everyone)[0]
