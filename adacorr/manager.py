"""The cache manager: sequences policy, predictor and correction for every block call of a run.

A run's state is born in `CacheManager.run` and dies with it, also on an exception:

    manager = CacheManager(policy=make_policy("interval:every=5"), correction=AdaCorrection())
    with manager.run(model, labels, sampler.timesteps, alpha_bar, cfg_scale=1.5) as run:
        for step in range(len(timesteps)):
            run.begin_step(step)
            out = model(x, t, y)          # rows [conditional; unconditional]; the blocks go through run.run_blocks
            ...
    manager.trace.compute                 # executed block FLOPs over uncached ones
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.control import Controller, carries_difference
from adacorr.correct import AdaCorrection, Literal
from adacorr.gates import fit_gate_basis
from adacorr.literal import LiteralRun
from adacorr.offset import innovation
from adacorr.predict import Active, Predictor, Segment
from adacorr.trace import COMPUTE, Trace, check_call
from adacorr.types import Policy, View

# Most steps that one forecast covers: it holds that many outputs of the stack besides the history.
LOOK_AHEAD = 8


@dataclass(frozen=True)
class Rewind:
    """Images (m,) whose steps `start` (m,) .. now - 1 are to be taken again with interpolated activations."""

    images: np.ndarray
    start: np.ndarray


class CacheManager:
    """Configuration of a cached sampler; `trace` and `bytes` report the last run.

    policy      says when (None: never compute again of its own accord; AdaCorrection alone decides)
    correction  AdaCorrection (the practical form), Literal (the paper's Algorithm 1) or None (the policy alone)
    dtype       of the stored tensors; float32 by default, since forecasts amplify the rounding of bf16
    """

    def __init__(
        self,
        policy: Policy | None = None,
        correction: AdaCorrection | Literal | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if policy is None and correction is None:
            raise ValueError("a cache needs a policy, a correction or both: give --cache POLICY or --adacorr")
        if policy is not None and isinstance(correction, Literal):
            raise ValueError(
                f"literal AdaCorrection computes every block, so policy {policy.name!r} would never be "
                "asked: give one of the two"
            )
        self.policy, self.correction, self.dtype = policy, correction, dtype
        self.trace: Trace | None = None
        self.bytes = 0

    @contextmanager
    def run(
        self,
        model: nn.Module,
        labels: Tensor | None,
        timesteps: Tensor,
        alpha_bar: np.ndarray,
        *,
        cfg_scale: float = 1.0,
        images: int | None = None,
        rewindable: bool = True,
    ) -> Iterator["CacheRun"]:
        """Attach to `model` for one sampling run.

        labels (n,) on any device, or None with `images` for an unconditional model; timesteps (S,) in sampling order
        with their alpha_bar (S,). With cfg_scale other than 1 the model is called on rows [labels; null labels].
        `rewindable`: the sampler can take a step again. Raises RuntimeError if a cache is attached already.
        """
        if model.cache is not None:
            raise RuntimeError("a cache run is open on this model: leave its `with` block before the next one")
        n = images if labels is None else len(labels)
        halves = 1 if cfg_scale == 1.0 else 2
        self.trace = Trace(len(timesteps), len(model.blocks), n, halves, model.block_flops())
        with torch.no_grad():
            if isinstance(self.correction, Literal):
                run = LiteralRun(self.correction, self.trace)
            else:
                run = CacheRun(self, model, labels, timesteps, alpha_bar, cfg_scale, rewindable)
            model.cache = run
            try:
                yield run
            finally:
                model.cache = None
                self.bytes = run.bytes


class CacheRun:
    """One run's state. The sampling loop calls `begin_step`, then the model; after the model it looks at `rewind`."""

    def __init__(
        self,
        manager: CacheManager,
        model: nn.Module,
        labels: Tensor | None,
        timesteps: Tensor,
        alpha_bar: np.ndarray,
        cfg_scale: float,
        rewindable: bool,
    ):
        self.trace, self.correction = manager.trace, manager.correction
        self.policy = copy.deepcopy(manager.policy)
        self.images, self.halves = self.trace.images, self.trace.halves
        self.timesteps = timesteps.double().cpu().numpy()
        self.everyone = np.arange(self.images)
        self.rewinds = rewindable and self.correction is not None and self.correction.rewind
        self.step: int | None = None
        self.rewind: Rewind | None = None
        self._replay: tuple[np.ndarray, int] | None = None
        self._ahead: dict[int, tuple[range, list[Tensor]]] = {}  # forecasts of coming steps, by segment
        self._added: Tensor | None = None  # (halves * n, T, D): what the stack added in the current step
        self._last = np.full(self.images, -1)  # newest step that computed the whole stack
        self._make_segments(model, labels, timesteps, manager.dtype)
        if self.policy is not None:
            self.policy.begin(self.images, len(self.timesteps))
        self.controller = None
        if self.correction is not None:
            gates = self.trace.overhead_flops / (self.trace.block_flops * self.trace.layers)
            self.controller = Controller(
                self.correction, self.timesteps, alpha_bar, self.images, self.halves, cfg_scale, spent=gates
            )

    # ------------------------------------------------------------------ set-up

    def _make_segments(self, model, labels, timesteps, dtype):
        device = model.pos_embed.device
        depth, shape = len(model.blocks), tuple(model.pos_embed.shape[1:])
        predictor = self.policy.predictor if self.policy is not None else None
        if self.correction is not None:
            predictor = Predictor("branches", self.correction.order, self.correction.gate_error)
        spans = [(0, depth)] if self.policy is None else self.policy.segments(depth)
        if [s for s, _ in spans] + [depth] != [0] + [e for _, e in spans]:
            raise ValueError(
                f"policy {self.policy.name!r} splits {depth} blocks into {spans}: segments must follow "
                "one another from block 0 to the last"
            )
        basis, index = None, torch.zeros(self.images, dtype=torch.long)
        if predictor is not None and predictor.kind == "branches":
            basis, index = self._fit_gates(model, labels, timesteps, predictor.gate_error)
        self.carries = self.correction is not None and carries_difference(self.correction, self.halves)
        self.spans = spans
        # Newest step that computed each segment, by its first block.
        self._ran = {start: np.full(self.images, -1) for start, _ in spans}
        self.segments = (
            []
            if predictor is None
            else [
                Segment(
                    start, stop, predictor, basis, index.to(device), self.halves, shape, self.carries, device, dtype
                )
                for start, stop in spans
            ]
        )

    def _fit_gates(self, model, labels, timesteps, gate_error):
        """The gate basis of the run and each image's index into its labels."""
        t = timesteps.to(model.pos_embed.device)
        self.trace.overhead_flops = len(t) * len(model.blocks) * model.gate_flops()
        if labels is None:
            reference = model.condition(t)
            basis = fit_gate_basis(model.blocks, reference, [reference[None]], gate_error)
            return basis, torch.zeros(self.images, dtype=torch.long)
        unique, index = torch.unique(labels, return_inverse=True)
        steps = t.repeat(len(unique))
        conditions = [model.condition(steps, unique.repeat_interleave(len(t))).view(len(unique), len(t), -1)]
        # The last row of the label table: the null label where the model has one.
        last = torch.full(t.shape, model.y_embedder.embedding_table.num_embeddings - 1, device=t.device)
        reference = model.condition(t, last)
        if self.halves == 2:
            conditions.append(reference[None])
        return fit_gate_basis(model.blocks, reference, conditions, gate_error), index

    # ------------------------------------------------------------------ the sampling loop's side

    @property
    def bytes(self) -> int:
        """Bytes of stored tensors."""
        return sum(segment.bytes for segment in self.segments)

    def begin_step(self, step: int) -> None:
        """Announce the step (0..S-1, in sampling order) that the next model call belongs to."""
        self.step, self.rewind, self._replay, self._between = step, None, None, None

    @contextmanager
    def replay(self, images: np.ndarray, step: int) -> Iterator[None]:
        """Within, the model is called on `images` (m,) at an earlier step or this one again; no block runs."""
        self._replay = (images, step)
        try:
            yield
        finally:
            self._replay = None

    @property
    def anchored(self) -> np.ndarray:
        """(m,) images whose next rewind starts right after the current step: their state there is to be kept."""
        return np.flatnonzero(self._last == self.step) if self.rewinds else self.everyone[:0]

    # ------------------------------------------------------------------ the model's side

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        """The stack of blocks through the cache: x (halves * n, T, D), c (halves * n, D) -> (halves * n, T, D)."""
        if self._replay is not None:
            return x + self._replayed().to(x.dtype)
        check_call(self.trace, self.step, x)
        x_in, collected = x, []
        full = np.ones(self.images, dtype=bool)
        for i, (start, stop) in enumerate(self.spans):
            segment = self.segments[i] if self.segments else None
            x, active, fresh = self._run_segment(segment, start, stop, blocks, x, x_in, c)
            full[np.setdiff1d(self.everyone, active.cond)] = False
            collected.append(fresh)
        # Corrected, a node needs all segments of the stack from the same state; alone, each segment has its own nodes.
        keep = full if self.controller is not None else np.ones_like(full)
        for segment, fresh in zip(self.segments, collected, strict=False):
            if fresh is not None and keep.any():
                segment.store(fresh, keep, self.timesteps[self.step])
                self._ahead.clear()
        if self.rewinds:
            self._added = x - x_in
            gap = full & (self._last >= 0) & (self.step - self._last > 1)
            if gap.any():
                self.rewind = Rewind(np.flatnonzero(gap), self._last[gap] + 1)
        self._last[full] = self.step
        self.trace.done = self.step + 1
        return x

    def _replayed(self) -> Tensor:
        """What the stack adds to the images of the replay at its step: (halves * m, T, D)."""
        images, step = self._replay
        if step == self.step:
            added = self._added.unflatten(0, (self.halves, -1))
            return (added if len(images) == self.images else added[:, torch.from_numpy(images)]).flatten(0, 1)
        self.trace.rewound += len(images)
        if self._between is None:  # the whole gap in one pass over the stored tensors
            past = np.arange(self.rewind.start.min(), self.step)
            parts = [s.predict(self.rewind.images, past, self.timesteps[past]) for s in self.segments]
            self._between = [sum(halves[1:], halves[0]) for halves in zip(*parts, strict=True)]
        added = [half[:, step - self.rewind.start.min()] for half in self._between]
        if len(images) < len(self.rewind.images):
            rows = torch.from_numpy(np.searchsorted(self.rewind.images, images))
            added = [half[rows] for half in added]
        return torch.cat(added)

    def _run_segment(self, segment: Segment | None, start, stop, blocks, x, x_in, c):
        """One segment -> (its output for all rows, what was computed, what is to be stored)."""
        step, n = self.step, self.images
        want, view = self._ask_policy(start, blocks, x, x_in, c)
        weight, cond, uncond = self._decide(segment, stop, want)
        active = Active(np.flatnonzero(cond), np.flatnonzero(uncond) if self.halves == 2 else self.everyone[:0])
        everything = bool(cond.all() and uncond.all())
        corrects = self.controller is not None and stop == len(blocks)

        fresh = out = head = rows = None
        if len(active.cond):
            rows = None if everything else torch.from_numpy(active.rows(n)).to(x.device)
            head, condition = (x, c) if rows is None else (x[rows], c[rows])
            fresh = segment.collect(active) if segment is not None else None
            out, tap = head, fresh.tap() if fresh is not None else None
            for block in blocks[start:stop]:
                out = block(out, condition, tap)
            if fresh is not None:
                fresh.finish(head, out)

        # The forecast is for images that skip, to measure offsets against, and for the half that is carried: that one
        # adds what the computed half did, less the forecast difference of the two.
        known = segment is not None and not segment.empty.any()
        measures = corrects and fresh is not None
        guess = self._forecast(segment) if known and (not cond.all() or measures) else None
        added = out - head if measures else None
        carried = None
        if guess is not None and measures and self.carries:
            own = torch.from_numpy(active.cond).to(x.device)
            carried = added[: len(active.cond)] + (guess[1] - guess[0])[own]

        result = out if everything else self._merge(segment, x, guess, carried, out, rows, active)
        score = np.full(n, np.nan)
        if measures:
            score = self._measure(guess, carried, added, active)
        if view is not None:
            self.policy.computed(view, cond)
        self._ran[start][active.cond] = step
        self._record(start, stop, active, score, weight)
        return result, active, fresh

    def _forecast(self, segment: Segment) -> list[Tensor]:
        """The segment's forecast for all images at this step: (n, T, D) for each half.

        Where the steps up to the next node are known, one pass over the stored tensors serves them all.
        """
        steps, ahead = self._ahead.get(segment.start, (range(0), []))
        if self.step not in steps:
            stop = self.step + 1
            if self.controller is not None and self.policy is None:
                due = self.controller.next_due() + 1  # the offset is measured at the node itself
                stop = int(np.clip(due, stop, min(self.step + LOOK_AHEAD, len(self.timesteps))))
            steps = range(self.step, stop)
            ahead = segment.predict(self.everyone, np.arange(self.step, stop), self.timesteps[self.step : stop])
            self._ahead[segment.start] = steps, ahead
        return [half[:, self.step - steps.start] for half in ahead]

    def _merge(self, segment, x, guess, carried, out, rows, active):
        """Output of a segment for all rows from its forecast, the carried halves and the computed rows."""
        n, adds = self.images, segment.predictor.kind != "output"
        result = torch.empty_like(x)
        for half, value in enumerate(guess or ()):
            own = slice(half * n, (half + 1) * n)
            if adds:
                torch.add(x[own], value.to(x.dtype), out=result[own])
            else:
                result[own] = value
        if carried is not None:
            null_rows = torch.from_numpy(active.cond + n).to(x.device)
            result[null_rows] = x[null_rows] + carried.to(x.dtype)
        if out is not None:
            result[rows] = out
        return result

    def _record(self, start, stop, active, score, weight):
        trace, step = self.trace, self.step
        trace.score[step, start:stop], trace.weight[step, start:stop] = score, weight
        trace.action[step, start:stop, active.cond, 0] = COMPUTE
        if self.halves == 2:
            trace.action[step, start:stop, active.uncond, 1] = COMPUTE

    # ------------------------------------------------------------------ decisions

    def _ask_policy(self, start, blocks, x, x_in, c):
        if self.policy is None:
            return np.zeros(self.images, dtype=bool), None
        by_half = (v.unflatten(0, (self.halves, -1)) for v in (x, x_in, c))
        age = np.where(self._ran[start] < 0, 0, self.step - self._ran[start])
        view = View(self.step, len(self.timesteps), start, blocks, *by_half, age)
        want = np.asarray(self.policy.decide(view), dtype=bool)
        if want.shape != (self.images,):
            raise ValueError(
                f"policy {self.policy.name!r} decided with shape {want.shape}; one truth value for each "
                f"of {self.images} images is needed"
            )
        return want, view

    def _decide(self, segment, stop, want):
        """(weight, conditional half computed, unconditional half computed), each (n,)."""
        empty = segment.empty if segment is not None else np.ones(self.images, dtype=bool)
        if self.controller is None or stop < self.trace.layers:
            cond = want | empty
            return cond.astype(np.float64), cond, cond
        return self.controller.decide(self.step, want | empty, empty)

    def _measure(self, guess, carried, added, active):
        """Offsets (n,) of what was just computed against its forecast; the controller learns them."""
        offset, gap_offset = np.full(len(active.cond), np.nan), np.full(len(active.uncond), np.nan)
        lam, a = self.correction.spatial_weight, len(active.cond)
        index = torch.from_numpy(active.cond).to(added.device)
        if guess is not None and not self.carries:
            fresh = added.unflatten(0, (self.halves, -1)).transpose(0, 1).flatten(1, 2)
            offset = innovation(fresh, torch.cat([g[index] for g in guess], dim=1), lam).cpu().numpy()
        elif guess is not None:
            offset = innovation(added[:a], guess[0][index], lam).cpu().numpy()
            if len(active.uncond):
                known = carried[torch.from_numpy(active.shared).to(added.device)]
                gap_offset = innovation(added[a:], known, lam).cpu().numpy()
        score = np.full(self.images, np.nan)
        score[active.cond] = self.controller.learn(self.step, active.cond, offset, active.uncond, gap_offset)
        return score
