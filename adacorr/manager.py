"""The cache manager: attaches a caching method, AdaCorrection, or both to a model for one sampling run.

A run's state is born in `CacheManager.run` and dies with it, also on an exception; `adacorr/__init__.py` shows the
calls, and `pipeline.sample_latents` is the whole loop.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.control import Controller, infers_unconditional
from adacorr.correct import AdaCorrection, Algorithm1, parse_correction
from adacorr.corrected_run import CorrectedRun
from adacorr.gates import GateBasis, conditions, distinct, fit_gate_basis, known_gate_basis, null_condition
from adacorr.history import WEIGHTS, History, Polynomial, Rule
from adacorr.injected_noise import renewed
from adacorr.linear_steps import LinearSteps
from adacorr.literal import Algorithm1Run
from adacorr.model import CachedModel
from adacorr.model_profile import KEPT, KINDS, SAMPLER, ModelProfile
from adacorr.policies import make_policy
from adacorr.policy import Policy, Predictor, RunInfo
from adacorr.policy_run import PolicyRun
from adacorr.profile import STACK, Profile, command, mismatch
from adacorr.run import CachedRun
from adacorr.spec import spell
from adacorr.stack_profile import GATE_ERROR, StackProfile
from adacorr.store import GateSumStore, Track, UnitStore, ValueStore
from adacorr.trace import Trace
from adacorr.transfer import on_device
from adacorr.unit import Unit

KNOWN = {"adacorr": ModelProfile, STACK: StackProfile}  # by the method of their profiles


class CacheManager:
    """Configuration of a cached sampler; `trace` and `bytes` report the last run.

    policy      a caching method: says when, and alone also what is reused (None: AdaCorrection decides alone)
    correction  AdaCorrection (the practical form), Algorithm1 (the paper's Algorithm 1) or None (the policy alone)
    dtype       of the stored tensors; float32 by default, since forecasts amplify the rounding of bf16. Refused by
                Algorithm1 and by policies alone without a predictor, which store tensors of the model
    profile     what is known of the model, for the best forecast and for the steps to compute: of method "adacorr"
                (adacorr.model_profile), or "adacorr-stack" (adacorr.stack_profile). Without one AdaCorrection forecasts
                by polynomials

    Raises ValueError for what does not go together.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        correction: AdaCorrection | Algorithm1 | None = None,
        dtype: torch.dtype = torch.float32,
        profile: Profile | None = None,
    ):
        if policy is None and correction is None:
            raise ValueError("a cache needs a policy, a correction or both: give --cache POLICY or --adacorr")
        if policy is not None and isinstance(correction, Algorithm1):
            raise ValueError(
                f"literal AdaCorrection computes every block, so policy {policy.name!r} would never be "
                "asked: give one of the two"
            )
        self.policy, self.correction, self.dtype = policy, correction, dtype
        own_tensors = isinstance(correction, Algorithm1) or (correction is None and policy.predictor is None)
        if own_tensors and dtype != torch.float32:
            raise ValueError(f"a dtype of stored tensors (--cache-dtype) has no effect on {self.name}: leave it out")
        self.profile, self._known = profile, None
        if profile is not None:
            if not isinstance(correction, AdaCorrection):
                raise ValueError("a profile of the model serves AdaCorrection alone: give a correction, or no profile")
            if given := correction.polynomial_options:
                raise ValueError(f"adacorr: {given} is of the polynomial, which a profile of the model replaces")
            if profile.method not in KNOWN:
                raise ValueError(f"a profile of {profile.method!r} is none of AdaCorrection's: {', '.join(KNOWN)}")
            self._known = KNOWN[profile.method].of(profile)
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

    def knowing(self, profile: Profile) -> "CacheManager":
        """The same configuration with a profile of the model."""
        return CacheManager(self.policy, self.correction, self.dtype, profile)

    @property
    def name(self) -> str:
        """Method and form in a few words: "teacache", "adacorr", "teacache + adacorr", "literal"."""
        return " + ".join(part.name for part in self._parts)

    @property
    def spec(self) -> str:
        """What --cache and --adacorr were, with defaults left out: "teacache:threshold=0.2+adacorr:gamma=2"."""
        return "+".join(spell(part.name, part) for part in self._parts)

    @property
    def _parts(self) -> list[Policy | AdaCorrection | Algorithm1]:
        return [part for part in (self.policy, self.correction) if part is not None]

    def open(
        self,
        model: CachedModel,
        labels: Tensor | None,
        timesteps: Tensor,
        alpha_bar: np.ndarray,
        *,
        cfg_scale: float = 1.0,
        images: int | None = None,
        rewindable: bool = True,
        eta: float = 0.0,
        model_id: str | None = None,
        sampler: str | None = None,
        spent: float = 0.0,
        steps: LinearSteps | None = None,
    ) -> CachedRun:
        """The state of one sampling run, attached to nothing: for a loop that calls `run_blocks` itself.

        labels (n,) on any device, or None with `images` for an unconditional model; timesteps (S,) in sampling order
        with their alpha_bar (S,). With cfg_scale other than 1 the model is called on rows [labels; null labels].
        `rewindable`: the sampler can take a step again; `eta`: how much noise it injects, as in DDIM. model_id (the
        checkpoint's sha256) and sampler (its spec) are what profiles of methods are held to; `spent`: evaluations that
        were made for the run before; with the sampler's `steps` schedules of AdaCorrection are made for it. Raises
        ValueError for what the policy refuses.
        """
        n = images if labels is None else len(labels)
        halves = 1 if cfg_scale == 1.0 else 2
        self.trace = Trace(len(timesteps), len(model.blocks), n, halves, model.branch_flops())
        self.trace.extra_flops = round(spent * self.trace.evaluation_flops)
        corrected = isinstance(self.correction, AdaCorrection)
        tokens, width, device = model.stream
        info = RunInfo(
            images=n,
            visible_halves=1 if corrected and infers_unconditional(self.correction, halves) else halves,
            timesteps=timesteps.double().cpu().numpy(),
            blocks=model.blocks,
            tokens=tokens,
            width=width,
            device=device,
            branch_flops=model.branch_flops(),
            cfg_scale=cfg_scale,
            corrected=corrected,
            model_id=model_id,
            sampler=sampler,
        )
        with torch.no_grad():
            run = self._open(model, labels, timesteps, np.asarray(alpha_bar), info, rewindable, eta, steps)
        run.captured = model.captured
        return run

    @contextmanager
    def run(self, model: nn.Module, *where: Any, **options: Any) -> Iterator[CachedRun]:
        """Attach to `model`, a models.DiT, for one sampling run; arguments and errors are those of `open`.

        Raises RuntimeError if a cache is attached already.
        """
        if model.cache is not None:
            raise RuntimeError("a cache run is open on this model: leave its `with` block before the next one")
        with torch.no_grad():
            run = model.cache = self.open(model, *where, **options)
            hooks = [model.register_forward_hook(run.change_output)] if isinstance(run, PolicyRun) else []
            try:
                yield run
                run.close()
            finally:
                model.cache = None
                for hook in hooks:
                    hook.remove()
                self.bytes = run.bytes

    def _open(self, model, labels, timesteps, alpha_bar, info: RunInfo, rewindable, eta, steps) -> CachedRun:
        """The run's state, by what this manager was given."""
        if isinstance(self.correction, Algorithm1):
            return Algorithm1Run(self.correction, info, self.trace)
        policy, trace = copy.deepcopy(self.policy), self.trace
        if policy is not None:
            policy.begin(info)
        stores = _Stores(model, labels, timesteps, info, trace, self.dtype)
        if self.correction is None:
            return PolicyRun(policy, info, trace, stores.make)
        whole, noise, injected = Unit(0, info.depth), None, None
        if self.profile is not None:
            sampler = SAMPLER if isinstance(self._known, ModelProfile) else info.sampler
            made_for = info.model_id, sampler, info.cfg_scale
            why = mismatch(self.profile, self.profile.method, *made_for)
            width = self._known.mean[KINDS[0]].shape[2]
            if not why and width != info.width:
                why = f"width {width} there, {info.width} here"
            if why:
                way = f"make one with {command(self.profile.method)}"
                raise ValueError(f"adacorr: the profile of the model does not fit this run ({why}); {way}")
        if not isinstance(self._known, ModelProfile):
            gate_error = self.correction.gate_error if self._known is None else GATE_ERROR
            predictor = Predictor("branches", self.correction.order, gate_error)
            store = stores.make(whole, predictor, info.visible_halves < trace.halves, self._known)
        else:
            injected = renewed(alpha_bar, eta)
            store = stores.known(whole, self._known, injected)
            if eta:
                size = model.in_channels, model.input_size, model.input_size
                noise = self._known.noise(info.timesteps, alpha_bar, size, store.tracks[0])
        spent = trace.extra_flops / trace.evaluation_flops
        run = info.timesteps, alpha_bar, info.images, trace.halves, info.cfg_scale
        controller = Controller(self.correction, *run, spent, self._known, injected if eta else None, steps)
        return CorrectedRun(policy, self.correction, controller, info, trace, store, rewindable, noise)


class _Stores:
    """Makes the stores of one run; the gates of all blocks are factored once, when the first of them needs it."""

    def __init__(
        self,
        model: CachedModel,
        labels: Tensor | None,
        timesteps: Tensor,
        info: RunInfo,
        trace: Trace,
        dtype: torch.dtype,
    ):
        self.model, self.info, self.trace, self.dtype = model, info, trace, dtype
        self.timesteps = on_device(timesteps, info.device)
        self.index = np.zeros(trace.images, dtype=np.int64)  # of each image's label among the run's labels
        self.unique: Tensor | None = None
        if labels is not None:
            self.unique, self.index = distinct(labels, info.device)
        self.basis: GateBasis | None = None

    def make(
        self, unit: Unit, predictor: Predictor, difference: bool = False, profile: StackProfile | None = None
    ) -> UnitStore:
        """The store of one unit under a predictor, or with its gates under what is known of the stack."""
        gated = hasattr(self.model.blocks[0], "gates")
        if predictor.kind == "residual" or predictor.stands_before_gate(unit) or not gated:
            tracks = self._tracks(np.ones((len(self.timesteps), 1)), predictor, profile)
            return ValueStore(tracks, predictor.stands_before_gate(unit), difference)
        if self.basis is None:
            self._count_gates(len(self.timesteps) * self.trace.halves)
            reference = null_condition(self.model, self.timesteps)
            own = conditions(self.model, self.timesteps, self.unique, self.trace.halves)
            self.basis = fit_gate_basis(self.model.blocks, reference, own, predictor.gate_error)
        tracks = self._tracks(self.basis.basis.cpu().numpy(), predictor, profile)
        return GateSumStore(unit, self.basis, self.index, tracks, difference)

    def _tracks(self, basis: np.ndarray, predictor: Predictor, profile: StackProfile | None) -> list[Track]:
        """One for each half; basis (S, E): how a step reads its entries."""
        kinds, at, entries = KINDS[: self.trace.halves], self.info.timesteps, basis.shape[1]
        if profile is not None:
            means = [profile.mean_at(kind, at, basis) for kind in kinds]
            parts = zip(kinds, means, strict=True)
            return [self._track(entries, KEPT[kind], profile.rule(kind, at), mean=mean) for kind, mean in parts]
        weights = WEIGHTS[predictor.weights]
        if predictor.weights == "hermite":
            weights = partial(weights, sigma=predictor.sigma)
        # TaylorSeer's and HiCache's count in steps.
        positions = at if predictor.weights == "lagrange" else np.arange(len(at), dtype=np.float64)
        rule = Polynomial(positions, predictor.order, weights)
        return [self._track(entries, predictor.order + 1, rule) for _ in kinds]

    def _track(self, entries: int, kept: int, *rules: Rule, mean: Tensor | None = None) -> Track:
        info = self.info
        history = History(info.images, kept, entries, info.tokens, info.width, info.device, self.dtype)
        return Track(history, rules, None if mean is None else on_device(mean, info.device))

    def known(self, unit: Unit, profile: ModelProfile, renewed: np.ndarray) -> GateSumStore:
        """The store of one unit under what is known of the model; renewed (S,) see `ModelProfile.rules`."""
        steps = self.info.timesteps
        known = self.timesteps
        if not np.array_equal(steps, profile.timesteps):
            known = on_device(profile.timesteps, self.info.device, self.timesteps.dtype)
            self._count_gates(len(steps))  # of the null label
        self._count_gates(len(known) * self.trace.halves)
        basis = known_gate_basis(
            self.model.blocks,
            null_condition(self.model, self.timesteps),
            null_condition(self.model, known),
            conditions(self.model, known, self.unique, self.trace.halves),
            torch.from_numpy(profile.basis),
            torch.from_numpy(profile.gate_weight),
        )
        tracks = []
        for kind in KINDS[: self.trace.halves]:
            mean = profile.mean_at(kind, steps)
            rules = profile.rules(kind, steps, renewed)
            tracks.append(self._track(basis.rank + 1, KEPT[kind], *rules, mean=mean))
        return GateSumStore(unit, basis, self.index, tracks, self.trace.halves == 2)

    def _count_gates(self, rows: int) -> None:
        """Account for the gates of so many rows for each image, though images share them."""
        self.trace.extra_flops += rows * self.trace.layers * self.model.gate_flops() * self.trace.images
