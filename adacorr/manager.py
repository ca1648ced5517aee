"""The cache manager: attaches a caching method, AdaCorrection, or both to a model for one sampling run.

A run's state is born in `CacheManager.run` and dies with it, also on an exception; `adacorr/__init__.py` shows the
calls, and `pipeline.sample_latents` is the whole loop.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.control import Controller, infers_unconditional
from adacorr.correct import ALIASES, AdaCorrection, Algorithm1, parse_correction
from adacorr.corrected_run import CorrectedRun
from adacorr.gates import GateBasis, fit_gate_basis
from adacorr.literal import Algorithm1Run
from adacorr.policies import make_policy
from adacorr.policy import Policy, Predictor, RunInfo
from adacorr.policy_run import PolicyRun
from adacorr.run import CachedRun
from adacorr.spec import spell
from adacorr.store import GateSumStore, StoreShape, UnitStore, ValueStore
from adacorr.trace import Trace
from adacorr.unit import Unit


class CacheManager:
    """Configuration of a cached sampler; `trace` and `bytes` report the last run.

    policy      a caching method: says when, and alone also what is reused (None: AdaCorrection decides alone)
    correction  AdaCorrection (the practical form), Algorithm1 (the paper's Algorithm 1) or None (the policy alone)
    dtype       of the stored tensors; float32 by default, since forecasts amplify the rounding of bf16
    """

    def __init__(
        self,
        policy: Policy | None = None,
        correction: AdaCorrection | Algorithm1 | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if policy is None and correction is None:
            raise ValueError("a cache needs a policy, a correction or both: give --cache POLICY or --adacorr")
        if policy is not None and isinstance(correction, Algorithm1):
            raise ValueError(
                f"literal AdaCorrection computes every block, so policy {policy.name!r} would never be "
                "asked: give one of the two"
            )
        self.policy, self.correction, self.dtype = policy, correction, dtype
        self.trace: Trace | None = None
        self.bytes = 0

    @classmethod
    def of(
        cls, policy: str | None, correction: str | None = None, dtype: torch.dtype = torch.float32
    ) -> "CacheManager | None":
        """The cache of two specs, as --cache and --adacorr take them; None without both. ValueError for a bad one."""
        if policy is None and correction is None:
            return None
        made = None if policy is None else make_policy(policy)
        return cls(made, None if correction is None else parse_correction(correction), dtype)

    @property
    def name(self) -> str:
        """Method and form in a few words: "teacache", "adacorr", "teacache + adacorr", "literal"."""
        form = {"NoneType": [], "Algorithm1": ["literal"], "AdaCorrection": ["adacorr"]}[type(self.correction).__name__]
        return " + ".join([*([] if self.policy is None else [self.policy.name]), *form])

    @property
    def spec(self) -> str:
        """What --cache and --adacorr were, with defaults left out: "teacache:threshold=0.2+adacorr:gamma=2"."""
        parts = [] if self.policy is None else [spell(self.policy.name, self.policy)]
        if self.correction is not None:
            name = "literal" if isinstance(self.correction, Algorithm1) else "adacorr"
            parts.append(spell(name, self.correction, ALIASES))
        return "+".join(parts)

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
        model_id: str | None = None,
        sampler: str | None = None,
    ) -> Iterator[CachedRun]:
        """Attach to `model` for one sampling run.

        labels (n,) on any device, or None with `images` for an unconditional model; timesteps (S,) in sampling order
        with their alpha_bar (S,). With cfg_scale other than 1 the model is called on rows [labels; null labels].
        `rewindable`: the sampler can take a step again. model_id (the checkpoint's sha256) and sampler (its spec) are
        what calibrated profiles are held to. Raises RuntimeError if a cache is attached already, ValueError for what
        the policy refuses.
        """
        if model.cache is not None:
            raise RuntimeError("a cache run is open on this model: leave its `with` block before the next one")
        n = images if labels is None else len(labels)
        halves = 1 if cfg_scale == 1.0 else 2
        self.trace = Trace(len(timesteps), len(model.blocks), n, halves, model.branch_flops())
        info = self._describe(model, n, halves, timesteps, cfg_scale, model_id, sampler)
        with torch.no_grad():
            run = self._open(model, labels, timesteps, np.asarray(alpha_bar), info, rewindable)
            model.cache = run
            try:
                yield run
            finally:
                model.cache = None
                self.bytes = run.bytes

    def grid(self, model: nn.Module, timesteps: Tensor, cfg_scale: float, model_id: str | None, sampler: str) -> Tensor:
        """(S,) the timesteps to sample on, those given unless the policy moves them; arguments as in `run`."""
        if self.policy is None or self.correction is not None:
            return timesteps
        moved = self.policy.grid(self._describe(model, 0, 1, timesteps, cfg_scale, model_id, sampler))
        return torch.from_numpy(moved) if (moved != timesteps.numpy()).any() else timesteps

    def _describe(self, model, images, halves, timesteps, cfg_scale, model_id, sampler) -> RunInfo:
        corrected = isinstance(self.correction, AdaCorrection)
        return RunInfo(
            images=images,
            visible_halves=1 if corrected and infers_unconditional(self.correction, halves) else halves,
            timesteps=timesteps.double().cpu().numpy(),
            blocks=model.blocks,
            tokens=model.pos_embed.shape[1],
            width=model.pos_embed.shape[2],
            device=model.pos_embed.device,
            branch_flops=model.branch_flops(),
            cfg_scale=cfg_scale,
            corrected=corrected,
            model_id=model_id,
            sampler=sampler,
        )

    def _open(self, model, labels, timesteps, alpha_bar, info: RunInfo, rewindable: bool) -> CachedRun:
        """The run's state, by what this manager was given."""
        if isinstance(self.correction, Algorithm1):
            return Algorithm1Run(self.correction, info, self.trace)
        policy, trace = copy.deepcopy(self.policy), self.trace
        if policy is not None:
            policy.begin(info)
        stores = _Stores(model, labels, timesteps, info, trace, self.dtype)
        if self.correction is None:
            return PolicyRun(policy, info, trace, stores.make)
        predictor = Predictor("branches", self.correction.order, self.correction.gate_error)
        store = stores.make(Unit(0, info.depth), predictor, infers_unconditional(self.correction, trace.halves))
        spent = trace.extra_flops / trace.evaluation_flops
        controller = Controller(
            self.correction, info.timesteps, alpha_bar, info.images, trace.halves, info.cfg_scale, spent
        )
        return CorrectedRun(policy, self.correction, controller, info, trace, store, rewindable)


class _Stores:
    """Makes the stores of one run; the gates of all blocks are factored once, when the first of them needs it."""

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor | None,
        timesteps: Tensor,
        info: RunInfo,
        trace: Trace,
        dtype: torch.dtype,
    ):
        self.model, self.labels, self.trace = model, labels, trace
        self.timesteps = timesteps.to(info.device)
        self.shape = StoreShape(
            info.images, trace.halves, (info.tokens, info.width), info.timesteps, info.device, dtype
        )
        self.index = torch.zeros(trace.images, dtype=torch.long)  # of each image's label among the run's labels
        if labels is not None:
            self.unique, self.index = torch.unique(labels, return_inverse=True)
        self.basis: GateBasis | None = None

    def make(self, unit: Unit, predictor: Predictor, difference: bool = False) -> UnitStore:
        """The store of one unit under a predictor."""
        if predictor.kind == "residual" or predictor.stands_before_gate(unit):
            return ValueStore(unit, predictor, self.shape)
        if self.basis is None:
            self.basis = self._fit_gates(predictor.gate_error)
        return GateSumStore(unit, predictor, self.shape, self.basis, self.index.to(self.shape.device), difference)

    def _fit_gates(self, gate_error: float) -> GateBasis:
        model, trace, t = self.model, self.trace, self.timesteps
        trace.extra_flops += len(t) * trace.layers * model.gate_flops() * trace.images * trace.halves
        if self.labels is None:
            reference = model.condition(t)
            return fit_gate_basis(model.blocks, reference, [reference[None]], gate_error)
        steps = t.repeat(len(self.unique))
        conditions = [model.condition(steps, self.unique.repeat_interleave(len(t))).view(len(self.unique), len(t), -1)]
        # The last row of the label table: the null label where the model has one.
        last = torch.full(t.shape, model.y_embedder.embedding_table.num_embeddings - 1, device=t.device)
        reference = model.condition(t, last)
        if trace.halves == 2:
            conditions.append(reference[None])
        return fit_gate_basis(model.blocks, reference, conditions, gate_error)
