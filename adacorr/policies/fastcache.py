"""FastCache (arXiv 2505.20353, NoakLiu/FastCache-xDiT): still tokens bypass the stack, still blocks are linear maps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.by_image import SCOPES
from adacorr.calibration.fastcache import FastCacheCalibration, load_maps
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, View, option
from adacorr.tokens import Places, moved, relative_norms, spend_tokens, split_tokens
from adacorr.transfer import on_device


@register
@dataclass
class FastCache(Policy):
    """Put a fitted linear map in the place of the stack for still tokens, of a block for a still input.

    threshold  relative Frobenius change of a block's input below which its map stands in for it; 0 never
    tau        a token moves if its squared change since the last step is at least tau times the image's largest; 0: all
    form       increment: the map corrects what was computed last; residual: the map alone, as documented
    scope      image: each image's blocks are tested with both its guidance halves; batch: one test for all
    profile    auto: the shipped maps; a file of `python calibrate.py`; none: plain reuse (form=increment only)

    After the first step, only tokens that moved, rounded up to a multiple of 8, go through the blocks and attend to
    each other. The others get what the stack's map gives. A block whose moving tokens changed by |H - H_ref| / |H_ref|
    < threshold is replaced by its map: residual F ~ H W + b[s] for what it adds, increment F ~ F_ref + (H - H_ref) W +
    b[s] - b[ref] from the token's last computed pair. Under AdaCorrection a step is proposed if block 0's test fails or
    most tokens move.

    Departures: the release's maps are random, these are ridge fits to uncached runs. Its chi-square test passes
    everything, so `threshold` is its code's rel_thresh; one token mask serves all of its images. A block's input is
    compared with its last computed one, where the documents say that of the step before.
    """

    threshold: float = option(0.05, low=0)
    tau: float = option(0.1, low=0)
    form: str = option("increment", choices=("increment", "residual"))
    scope: str = option("image", choices=SCOPES)
    profile: str | None = "auto"
    granularity = "token, block"
    split = "block"
    calibration = FastCacheCalibration
    knob = Knob("threshold", 0.003, 3.0, ("", "tau=0", "profile=none,tau=0"))
    predictor = None

    def __post_init__(self):
        super().__post_init__()
        if self.profile is None and self.form == "residual":
            raise ValueError("fastcache: profile=none must come with form=increment: a residual needs its map")

    def begin(self, info: RunInfo) -> None:
        self._maps = None if self.profile is None else load_maps(self.form, self.profile_for(info), info)
        self._known = np.zeros((info.depth, info.images), dtype=bool)  # blocks that ran
        self._before: Tensor | None = None  # (halves, n, T, D): the stack's input one step earlier
        self._whole = np.zeros(info.images, dtype=bool)  # images whose saliency is not finite: all of the step runs
        self._groups: list[tuple[Places, Places]] = []  # moving and still tokens of this step
        # (halves, n, T, D) under (name, block), block L being the stack: "computed" and "given" are the input of the
        # last computed pair and what was added less the bias. Proposals need block 0's input.
        self._state: dict[tuple[str, int], Tensor] = {}

    def decide(self, view: View) -> np.ndarray:
        if view.unit.start == 0 and self._before is not None:
            self._saliency = moved(view.x, self._before)  # (n, T)
            view.measured(self._saliency.sum(dim=1).cpu().numpy())
            self._whole = view.failed
        return ~self._known[view.unit.start] | self._whole

    def propose(self, view: View) -> np.ndarray:
        before, self._before = self._before, view.x_in
        if before is None or not self._known[0].all():
            return view.everyone()
        saliency = moved(view.x_in, before)
        then = self._state["computed", 0]
        moving = (saliency >= self.tau).unsqueeze(-1)
        change, size = ((v.float().square() * moving).sum(dim=(0, 2, 3)) for v in (view.x_in - then, then))
        sums = torch.stack([moving.float().mean(dim=(1, 2)), change, size, saliency.sum(dim=1)])
        share, change, size, total = sums.double().cpu().numpy()
        change, _ = view.measured(np.stack([relative_norms(change, size, self.scope), total]))
        return (share > 0.5) | ~(change < self.threshold)

    def computed(self, view: View, ran: Ran) -> None:
        block, depth, alone = view.unit.start, view.info.depth, not view.info.corrected
        place = slice(None), on_device(ran.images, ran.x.device)
        self._known[block, ran.images] = True
        if block == 0:
            self._before = view.x_in
        if block == 0 or alone:
            self._keep(view, block, place, ran.x, ran.value)
        if view.unit.stop == depth and alone:
            self._keep(view, depth, place, view.x_in[place], ran.out - view.x_in[place])

    def reuse(self, view: View, cached: Cached) -> Tensor:
        value, images = torch.zeros_like(view.x), on_device(cached.images, view.x.device)
        if view.unit.start == 0:
            self._groups = split_tokens(self._saliency, images, self.tau)
            self._before = view.x_in
            for _, still in self._groups:
                value[still] = self._map(view, view.info.depth, still, view.x[still])
        for (moving, _), runs in zip(self._groups, self._test(view), strict=True):
            for run in (True, False):
                chosen = on_device(np.flatnonzero(runs == run), images.device)
                at = slice(None), moving[1][chosen], moving[2][chosen]
                if at[2].numel():
                    value[at] = self._pass(view, at, run)
        return value if len(images) == view.images else value[:, images]

    def _test(self, view: View) -> list[np.ndarray]:
        """(g,) bool for each group: True where the block is to run for its moving tokens."""
        sums = []
        for moving, _ in self._groups:
            now, then = (v[moving].float() for v in (view.x, self._state["computed", view.unit.start]))
            sums.append(torch.stack([v.square().sum(dim=(0, 2, 3)) for v in (now - then, then)]))
        change = relative_norms(*torch.cat(sums, dim=1).double().cpu().numpy(), self.scope)
        view.account.fallbacks += int((~np.isfinite(change)).sum())
        runs = ~(change < self.threshold)  # strictly below, so that 0 is never still; not a number runs
        return np.split(runs, np.cumsum([len(moving[1]) for moving, _ in self._groups])[:-1])

    def _pass(self, view: View, at: Places, runs: bool) -> Tensor:
        """What the block adds to the tokens at these places, (halves, g, M, D): computed, or from its map."""
        block, depth, x = view.unit.start, view.info.depth, view.x[at]
        if runs:
            condition = view.conditioning.c.unflatten(0, (len(x), -1))[:, at[1][:, 0]]
            value = view.block(x.flatten(0, 1), condition.flatten(0, 1)).view_as(x) - x
            self._keep(view, block, at, x, value)
            spend_tokens(view, at)
        else:
            value = self._map(view, block, at, x)
        if view.unit.stop == depth:
            # Block maps never look at the stack's pair, so no error can go round through it.
            self._keep(view, depth, at, view.x_in[at], x + value - view.x_in[at])
        return value

    def _map(self, view: View, index: int, at: Places, x: Tensor) -> Tensor:
        """What map `index` gives for x (halves, g, M, D), the input at these places."""
        if self._maps is None:
            return self._state["given", index][at].to(x.dtype)
        weight, bias = self._maps[0][index], self._maps[1][view.step, index]
        view.spend_flops(2 * x.numel() * x.shape[-1])
        if self.form == "residual":
            return (x @ weight + bias).to(x.dtype)
        computed, given = (self._state[name, index][at] for name in ("computed", "given"))
        return (given + (x - computed) @ weight + bias).to(x.dtype)

    def _keep(self, view: View, index: int, at: tuple, x: Tensor, value: Tensor) -> None:
        """Note a computed pair of map `index` at these places."""
        kept = {"computed": x} if index < view.info.depth else {}
        if self.form == "increment" and not view.info.corrected:
            bias = 0.0 if self._maps is None else self._maps[1][view.step, index]
            kept |= {"computed": x, "given": value.float() - bias}
        for name, now in kept.items():
            if (name, index) not in self._state:
                self._state[name, index] = torch.zeros_like(view.x, dtype=now.dtype)
            self._state[name, index][at] = now
