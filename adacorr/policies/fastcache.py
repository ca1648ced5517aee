"""FastCache (arXiv 2505.20353, NoakLiu/FastCache-xDiT): still tokens bypass the stack, still blocks are linear maps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, Unit, View, check_adaptive
from adacorr.profile import Profile, find_profile

FORMS = ("increment", "residual")
REFERENCES = ("computed", "seen")
GROUP = 8  # moving tokens are rounded up to a multiple of it, so that images fall into few groups
LAGS = (1, 2, 4)  # steps between the pairs that increments are fitted on
HELD_OUT = 4  # every so many-th image is kept from the fit, to judge it by
RIDGE = 0.1  # of the mean squared input; strong, since errors of a map run on through the blocks behind it


def by_block(depth: int) -> list[Unit]:
    return [Unit(layer, layer + 1) for layer in range(depth)]


class Moments:
    """Sums over tokens for least squares y ~ x W + b[step], on values (kind 0) and on increments (kind 1) at once.

    Increments y_s - y_r of steps s, r are fitted to (x_s - x_r) W + b[s] - b[r]. Every pair of steps has the same
    weight, whatever its size: the large increments of the last steps would else make maps that fail in the first.
    """

    def __init__(self, steps: int, width: int, device: torch.device):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.products = zeros(2, width, 2 * width)  # x'x and x'y side by side
        self.squares = zeros(2)  # of y
        # (2, D) of x and y and their weight, for values by [step, 0], for increments by [step, 1 + index of the lag].
        self.sums = zeros(steps, 1 + len(LAGS), 2, width)
        self.weight = zeros(steps, 1 + len(LAGS))

    def add(self, step: int, now: tuple[Tensor, Tensor], past: list[tuple[int, Tensor, Tensor]]) -> None:
        """x and y (rows, D) of a step, and of earlier steps (step, x, y) for the same rows."""
        if not len(now[0]):
            return
        self._add(0, (step, 0), *now, torch.ones((), dtype=torch.float64, device=now[0].device))
        for before, x, y in past:
            by, size = now[1] - y, (now[1] - y).double().square().mean()
            tiny = torch.finfo(torch.float32).tiny
            self._add(1, (step, 1 + LAGS.index(step - before)), now[0] - x, by, 1 / size.clamp_min(tiny))

    def _add(self, kind: int, at: tuple[int, int], x: Tensor, y: Tensor, weight: Tensor) -> None:
        self.products[kind] += weight * (x.T @ torch.cat([x, y], dim=1)).double()
        self.squares[kind] += weight * y.double().square().sum()
        self.sums[at] += weight * torch.stack([x.double().sum(0), y.double().sum(0)])
        self.weight[at] += weight * len(x)

    @property
    def means(self) -> Tensor:
        """(S, 2, D) of x and y."""
        return self.sums[:, 0] / self.weight[:, 0].clamp_min(1)[:, None, None]

    def shifts(self, kind: int, means: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(weight, sum, mean) of every sum of the kind: sum (2, D), and the mean (2, D) that `means` takes off."""
        if kind == 0:
            return list(zip(self.weight[:, 0], self.sums[:, 0], means, strict=True))
        return [
            (self.weight[s, 1 + i], self.sums[s, 1 + i], means[s] - means[s - lag])
            for i, lag in enumerate(LAGS)
            for s in range(lag, len(means))
        ]

    def centred(self, kind: int, means: Tensor) -> tuple[Tensor, float]:
        """`products` and `squares` of a kind after `means` (S, 2, D) were taken off."""
        products, squares = self.products[kind].clone(), self.squares[kind].clone()
        for weight, total, mean in self.shifts(kind, means):
            wide = mean.flatten()
            products += weight * torch.outer(mean[0], wide)
            products -= torch.outer(total[0], wide) + torch.outer(mean[0], total.flatten())
            squares += weight * mean[1].square().sum() - 2 * (total[1] * mean[1]).sum()
        return products, squares

    def fit(self, kind: int) -> tuple[Tensor, Tensor]:
        """W (D, D) and b (S, D)."""
        products, _ = self.centred(kind, self.means)
        width = len(products)
        square, cross = products.split(width, dim=1)
        ridge = RIDGE * square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        weight = torch.linalg.solve(square + ridge * torch.eye(width, dtype=square.dtype, device=square.device), cross)
        return weight, self.means[:, 1] - self.means[:, 0] @ weight

    def r2(self, kind: int, weight: Tensor, bias: Tensor) -> float:
        """1 - error / error without a map, which is the spread of the values, or what plain reuse misses."""
        means = torch.stack([torch.zeros_like(bias), bias], dim=1)  # y - b ~ x W
        products, squares = self.centred(kind, means)
        square, cross = products.split(len(products), dim=1)
        error = squares - 2 * (weight * cross).sum() + (weight * (square @ weight)).sum()
        spread = self.squares[kind].clone()
        if kind == 0:
            spread -= self.sums[:, 0, 1].sum(0).square().sum() / self.weight[:, 0].sum()
        return float(1 - error / spread)


class FastCacheCalibration(Calibration):
    """The maps of all blocks and of the stack, in both forms, from uncached runs; every fourth image judges them."""

    def __init__(self):
        self._images = 0
        self._moments: list[tuple[Moments, Moments]] = []  # for each map: fitted, held out

    def units(self, depth: int) -> list[Unit]:
        return by_block(depth)

    def begin(self, info: RunInfo) -> None:
        if not self._moments:
            made = [[Moments(info.num_steps, info.width, info.device) for _ in range(2)] for _ in range(info.depth + 1)]
            self._moments = [tuple(pair) for pair in made]
        self._past: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self._moments]
        held = (self._images + np.arange(info.images)) % HELD_OUT == HELD_OUT - 1
        self._sets = [torch.from_numpy(np.flatnonzero(which)) for which in (~held, held)]
        self._images += info.images

    def computed(self, view: View, ran: Ran) -> None:
        self._observe(view.unit.start, view.step, ran.x, ran.value)
        if view.unit.stop == view.info.depth:
            self._observe(view.info.depth, view.step, view.x_in, ran.out - view.x_in)

    def _observe(self, index: int, step: int, x: Tensor, y: Tensor) -> None:
        past = self._past[index]
        lagged = [(before, *pair) for before, *pair in past if step - before in LAGS]
        for images, moments in zip(self._sets, self._moments[index], strict=True):
            images = images.to(x.device)

            def rows(v, images=images):
                return v[:, images].flatten(0, 2).float()

            moments.add(step, (rows(x), rows(y)), [(before, rows(a), rows(b)) for before, a, b in lagged])
        self._past[index] = [(step, x, y), *past][: max(LAGS)]

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        if self._images < HELD_OUT:
            raise ValueError(f"fastcache: {self._images} images are too few, as every {HELD_OUT}th is held out")
        arrays, notes = {}, {"images": self._images, "held_out": self._images // HELD_OUT}
        for kind, form in enumerate(reversed(FORMS)):
            maps = [fitted.fit(kind) for fitted, _ in self._moments]
            share = [held.r2(kind, *m) for (_, held), m in zip(self._moments, maps, strict=True)]
            arrays[f"{form}_weight"] = torch.stack([weight for weight, _ in maps])
            arrays[f"{form}_bias"] = torch.stack([bias for _, bias in maps], dim=1)
            notes[f"{form}_r2_blocks"] = [round(v, 4) for v in share[:-1]]
            notes[f"{form}_r2_stack"] = round(share[-1], 4)
        # Only differences of these count: centred, they lose least in half precision.
        arrays["increment_bias"] = arrays["increment_bias"] - arrays["increment_bias"].mean(0)
        return {name: value.cpu().numpy().astype(np.float16) for name, value in arrays.items()}, notes


@dataclass
class Group:
    """Images that move equally many tokens: positions (g,) among those of a step, tokens (g, M) and (g, T - M)."""

    positions: Tensor
    moving: Tensor
    still: Tensor


@register
@dataclass
class FastCache(Policy):
    """Put a fitted linear map in the place of the stack for still tokens, of a block for a still input.

    threshold  relative Frobenius change of a block's input below which its map stands in for it; 0 never
    tau        a token moves if its squared change since the last step is at least tau times the image's largest; 0: all
    form       increment: the map corrects what was computed last; residual: the map alone, as documented
    reference  what a block's input is compared with: computed, its input when it last ran; seen, its input at the step
               before, as documented
    scope      image: each image's blocks are tested with both its guidance halves; batch: one test for all
    profile    auto: the shipped maps; a file of `python calibrate.py`; none: plain reuse (form=increment only)

    Sources: docs/methods/fastcache.md, xfuser/model_executor/cache/utils.py. In each step after the first, the tokens
    whose squared change S_i (the larger of both halves) is at least tau * max S, rounded up to a multiple of 8 by the
    next ones, go through the blocks, where they attend to each other only. The others get what the stack's map gives.
    A block whose input (of the moving tokens) changed by d = |H - H_ref| / |H_ref| < threshold is replaced by its map.

    Maps are ridge fits to uncached runs with an intercept for every step: F ~ H W + b[s] for what a block adds
    (residual), or F - F_ref ~ (H - H_ref) W + b[s] - b[ref] from the token's last computed pair (increment; W = 0 and
    b = 0 is plain reuse). On held-out images of the bundled checkpoint the increment maps take away two thirds of a
    block's error under plain reuse and a quarter of the stack's (the profile's notes have R^2 for each); whole runs
    come far closer than with residual maps, hence the default.
    Stored: each block's and the stack's last computed pair (form=increment), the inputs compared with, and the maps.
    The blocks are one unit each, since only so the inputs of all blocks are seen in the first step.

    Where this departs from the release:
    - There, maps are random: nothing fits or loads them, and docs and README differ on whether they are learned.
    - The documented test d^2 <= chi2(ND, 1 - alpha) / ND compares a relative change with the quantile of a noise of
      variance 1: for ND of 10^4 and more the right side is 1, and everything passes. The code combines it with
      rel_thresh such that only d <= rel_thresh is left. So `threshold` is that, 0.05 as there (0.15 in its benchmark).
    - Its blocks are compared with the state of this very step, so that all but the first are skipped.
    - Its token mask holds for one image; here every image has its own.
    - reference=computed, since slow drift never exceeds a threshold from one step to the next.
    Under AdaCorrection a step is proposed if more than half of the tokens move (the rule for full computation of the
    release's accelerator variant) or block 0's test fails; nothing else is kept then.
    """

    threshold: float = 0.05
    tau: float = 0.1
    form: str = "increment"
    reference: str = "computed"
    scope: str = "image"
    profile: str | None = "auto"
    granularity = "token, block"
    calibration = FastCacheCalibration
    knob = Knob("threshold", 0.003, 3.0, ("", "tau=0", "profile=none,tau=0"))

    def __post_init__(self):
        check_adaptive("fastcache", self.threshold, self.scope)
        if not self.tau >= 0:
            raise ValueError(f"fastcache: tau={self.tau} must be at least 0")
        for option, choices in (("form", FORMS), ("reference", REFERENCES)):
            if getattr(self, option) not in choices:
                raise ValueError(f"fastcache: {option}={getattr(self, option)!r} must be one of {', '.join(choices)}")
        if self.profile is None and self.form == "residual":
            raise ValueError("fastcache: profile=none must come with form=increment: a residual needs its map")

    @property
    def predictor(self) -> None:
        return None

    def units(self, depth: int) -> list[Unit]:
        return by_block(depth)

    def begin(self, info: RunInfo) -> None:
        self._maps = None  # weight (L + 1, D, D) and bias (S, L + 1, D), the stack's last
        if self.profile is not None:
            dtype = next(info.blocks[0].parameters()).dtype
            weight, bias = read_maps(find_profile("fastcache", self.profile, info), self.form, info)
            # Intercepts of neighbouring steps are close: their differences need all digits.
            self._maps = torch.from_numpy(weight).to(info.device, dtype), torch.from_numpy(bias).to(info.device).float()
        self._known = np.zeros((info.depth, info.images), dtype=bool)  # blocks that ran
        self._before: Tensor | None = None  # (halves, n, T, D): the stack's input one step earlier
        self._saliency: Tensor | None = None  # (n, T) of this step
        self._whole = np.zeros(info.images, dtype=bool)  # images whose saliency is not finite: all of the step runs
        self._groups: list[Group] = []
        self._alone = True  # AdaCorrection needs no state but that of the proposal
        # (halves, n, T, D) under (name, block), block L being the stack: `computed` and `given` are the input of the
        # last computed pair and what was added less the bias; `seen` the last input.
        self._state: dict[tuple[str, int], Tensor] = {}

    def decide(self, view: View) -> np.ndarray:
        block = view.unit.start
        if block == 0 and self._before is not None:
            self._saliency = moved(view.x, self._before)
            view.measured(self._saliency.sum(dim=1).cpu().numpy())
            self._whole = view.failed
        return ~self._known[block] | self._whole

    def propose(self, view: View) -> np.ndarray:
        self._alone = False
        before, self._before = self._before, view.x_in
        if before is None or not self._known[0].all():
            return np.ones(view.images, dtype=bool)
        saliency = moved(view.x_in, before)
        then = before if self.reference == "seen" else self._state["computed", 0]
        moving = (saliency >= self.tau).unsqueeze(-1)
        change, size = ((v.float().square() * moving).sum(dim=(0, 2, 3)) for v in (view.x_in - then, then))
        sums = torch.stack([moving.float().mean(dim=(1, 2)), change, size, saliency.sum(dim=1)])
        share, change, size, total = sums.double().cpu().numpy()
        view.measured(total)
        return (share > 0.5) | ~(view.measured(self._change(change, size)) < self.threshold)

    def computed(self, view: View, ran: Ran) -> None:
        block, depth, images = view.unit.start, view.info.depth, torch.from_numpy(ran.images).to(ran.x.device)
        self._known[block, ran.images] = True
        if block == 0:
            self._before = view.x_in
        if block and not self._alone:
            return
        self._keep(view, block, (slice(None), images), ran.x, ran.value)
        if self._alone and view.unit.stop == depth:
            x_in = view.x_in[:, images]
            self._keep(view, depth, (slice(None), images), x_in, ran.out - x_in)

    # ------------------------------------------------------------------ a step that is not computed

    def reuse(self, view: View, cached: Cached) -> Tensor:
        block, images = view.unit.start, torch.from_numpy(cached.images).to(cached.x.device)
        value = torch.zeros_like(cached.x)
        if block == 0:
            self._groups = make_groups(self._saliency[images], self.tau)
            self._before = view.x_in
            for group in self._groups:
                at = (slice(None), group.positions[:, None], group.still)
                place = (slice(None), images[group.positions][:, None], group.still)
                value[at] = self._map(view, view.info.depth, place, cached.x[at])
        for group, run in zip(self._groups, self._test(view, images, cached.x), strict=True):
            if group.moving.shape[1]:
                self._pass(view, group, run, cached, images, value)
        return value

    def _test(self, view: View, images: Tensor, x: Tensor) -> list[np.ndarray]:
        """For each group (g,) bool: True where the block is to run."""
        reference = self._state[self.reference, view.unit.start]
        sums = []
        for group in self._groups:
            now = x[:, group.positions[:, None], group.moving].float()
            then = reference[:, images[group.positions][:, None], group.moving].float()
            sums.append(torch.stack([(now - then).square().sum(dim=(0, 2, 3)), then.square().sum(dim=(0, 2, 3))]))
        change = self._change(*torch.cat(sums, dim=1).double().cpu().numpy())
        view.measured_in_reuse(change)
        run = ~(change < self.threshold)  # strictly below, so that 0 is never still; not a number runs
        return np.split(run, np.cumsum([len(group.positions) for group in self._groups])[:-1])

    def _change(self, change: np.ndarray, size: np.ndarray) -> np.ndarray:
        """(m,) relative changes from squared norms (m,), nan where one is not finite."""
        if self.scope == "batch":
            change, size = (np.full_like(v, v.sum()) for v in (change, size))
        size = np.where(np.isfinite(size), size, np.nan)
        return np.sqrt(change / np.maximum(size, np.finfo(np.float32).tiny))

    def _pass(self, view: View, group: Group, run: np.ndarray, cached: Cached, images: Tensor, value: Tensor) -> None:
        """The moving tokens of a group through the block where `run` (g,), through its map elsewhere, into `value`."""
        block, depth = view.unit.start, view.info.depth
        condition = view.conditioning.c.unflatten(0, (view.info.visible_halves, -1))
        for runs in (True, False):
            chosen = torch.from_numpy(np.flatnonzero(run == runs)).to(images.device)
            if not len(chosen):
                continue
            positions, tokens = group.positions[chosen], group.moving[chosen]
            at, place = (slice(None), positions[:, None], tokens), (slice(None), images[positions][:, None], tokens)
            x = cached.x[at]
            if runs:
                out = view.block(x.flatten(0, 1), condition[:, images[positions]].flatten(0, 1)).view_as(x)
                value[at] = out - x
                self._keep(view, block, place, x, value[at])
                for branch, share in zip(("attn", "mlp"), shares(view, tokens.shape[1]), strict=True):
                    view.spend(block, branch, cached.images[positions.cpu().numpy()], share)
            else:
                value[at] = self._map(view, block, place, x)
                if self.reference == "seen":
                    self._state["seen", block][place] = x
            if view.unit.stop == depth:
                # Block maps never look at the stack's pair, so no error can go round through it.
                x_in = view.x_in[place]
                self._keep(view, depth, place, x_in, x + value[at] - x_in)

    def _map(self, view: View, index: int, place: tuple, x: Tensor) -> Tensor:
        """What map `index` gives for x (halves, g, M, D), which lies at `place` in the state."""
        if self._maps is None:
            return self._state["given", index][place].to(x.dtype)
        weight, bias = self._maps[0][index], self._maps[1][view.step, index]
        view.spend_flops(2 * x.numel() * x.shape[-1])
        if self.form == "residual":
            return (x @ weight + bias).to(x.dtype)
        change = (x - self._state["computed", index][place]) @ weight
        return (self._state["given", index][place] + change + bias).to(x.dtype)

    def _keep(self, view: View, index: int, place: tuple, x: Tensor, value: Tensor) -> None:
        """Note a computed pair of map `index` at `place`."""
        kept = {self.reference: x} if index < view.info.depth else {}
        if self.form == "increment" and self._alone:
            bias = 0.0 if self._maps is None else self._maps[1][view.step, index]
            kept |= {"computed": x, "given": value.float() - bias}
        for name, now in kept.items():
            if (name, index) not in self._state:
                self._state[name, index] = torch.zeros_like(view.x, dtype=now.dtype)
            self._state[name, index][place] = now


def moved(now: Tensor, before: Tensor) -> Tensor:
    """Saliency of every token over its image's largest: (halves, m, T, D) twice -> (m, T)."""
    change = (now.float() - before.float()).square().sum(dim=-1).amax(dim=0)
    return change / change.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def make_groups(saliency: Tensor, tau: float) -> list[Group]:
    """Images by how many tokens move, from (m, T)."""
    count = (saliency >= tau).sum(dim=1).cpu().numpy()
    count = np.minimum(-(-count // GROUP) * GROUP, saliency.shape[1])
    order = saliency.argsort(dim=1, descending=True, stable=True)
    groups = []
    for moving in np.unique(count):
        positions = torch.from_numpy(np.flatnonzero(count == moving)).to(saliency.device)
        own = order[positions]
        # In their own order, so that a group of all tokens is computed as without a cache.
        groups.append(Group(positions, own[:, :moving].sort(dim=1).values, own[:, moving:]))
    return groups


def shares(view: View, moving: int) -> tuple[float, float]:
    """Of the FLOPs of a block's attention and MLP for one row: what `moving` of its tokens need."""
    width, hidden = view.info.width, view.block.mlp.fc1.out_features

    def attn(tokens):
        return 4 * tokens * width + 2 * tokens * tokens + 3 * width  # linears; attention; half of adaLN

    def mlp(tokens):
        return 2 * tokens * hidden + 3 * width

    return attn(moving) / attn(view.info.tokens), mlp(moving) / mlp(view.info.tokens)


def read_maps(profile: Profile, form: str, info: RunInfo) -> tuple[np.ndarray, np.ndarray]:
    """Weight (L + 1, D, D) and bias (S, L + 1, D) of a form; ValueError if the profile has none for the run."""
    maps, width = info.depth + 1, info.width
    shapes = {f"{form}_weight": (maps, width, width), f"{form}_bias": (info.num_steps, maps, width)}
    for name, shape in shapes.items():
        found = profile.arrays[name].shape if name in profile.arrays else "none"
        if found != shape:
            raise ValueError(
                f"fastcache: the profile's {name} must have shape {shape}, and has {found}; make one with "
                "python calibrate.py --cache fastcache --out FILE"
            )
    return tuple(profile.arrays[name] for name in shapes)
