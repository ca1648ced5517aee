"""MLPs that run for a few tokens of each row: the rule of ToCa for which, on which DuCa and ProCache build.

A row is one guidance half of one image. All images compute at the same steps, so state and indices hold all rows.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacorr.policy import Policy, Predictor, Ran, RunInfo, Unit, View

CELL = 2  # the grid is cut into cells of 2 x 2 tokens; the best token of each gets a bonus


def remainders(steps: int, every: int, adapt: bool) -> np.ndarray:
    """(S, 2) int, in block 0 and in the blocks after it: steps left, modulo the interval; 0 where all tokens run.

    adapt  the interval is every / (1.4 - .8 i / S) with i steps left, and 2 from .4 S to .2 S steps left; else `every`

    A computed step sets the interval right after block 0. The blocks after it go by the new one, as in the releases.
    """
    found, interval = np.zeros((steps, 2), dtype=int), every
    for step in range(steps):
        left = steps - 1 - step
        found[step] = left % interval if step else 0
        if found[step, 0] == 0:
            factor = 1.4 - 0.8 * left / steps if adapt else 1.0
            interval = int(np.round(np.float32(every) / np.float32(factor)))  # the releases divide in float32
            if adapt and int(0.2 * steps) <= left < int(0.4 * steps):
                interval = 2
            found[step, 1] = left % interval if step else 0
    return found


# The share of fresh tokens is ratio * 2.5 * (a + b * steps left / S) * (c + d * block / last block), within 0 and 1.
RATIOS = {"ddim50": (3.0, -4.0, 0.8, 0.4), "ddpm250": (1.4, -0.8, 1.8, -1.6)}


def fresh_count(info: RunInfo, step: int, layer: int, ratio: float, ratios: str) -> int:
    """Tokens of a row that the MLP of a block runs for at a step between two computed ones."""
    a, b, c, d = RATIOS[ratios]
    by_step = a + b * (info.num_steps - 1 - step) / info.num_steps
    by_layer = c + d * layer / max(info.depth - 1, 1)
    share = np.float32(min(max(ratio * by_layer * by_step * 2.5, 0.0), 1.0))
    return int(share * np.float32(info.tokens))


def received_attention(block: nn.Module, z: Tensor) -> Tensor:
    """(rows, T): what each token gets of all tokens' attention, over the row's norm; z (rows, T, D) is modulated."""
    attn, qk = block.attn, 2 * z.shape[-1]
    bias = None if attn.qkv.bias is None else attn.qkv.bias[:qk]
    q, k = F.linear(z, attn.qkv.weight[:qk], bias).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 3, 0, 1, 4)
    q, k = attn.q_norm(q) * attn.scale, attn.k_norm(k)
    total = 0.0
    for queries, keys in zip(q, k, strict=True):  # head by head, since the maps of all heads are large
        total = total + (queries @ keys.transpose(1, 2)).float().softmax(dim=-1).sum(dim=1)
    return F.normalize(total, dim=-1)


def with_bonus(score: Tensor, bonus: float) -> Tensor:
    """score (..., T) on a square grid, with that of the best token of each cell times 1 + bonus."""
    cells = math.isqrt(score.shape[-1]) // CELL
    by_cell = score.unflatten(-1, (cells, CELL, cells, CELL)).transpose(-3, -2).flatten(-2)
    best = by_cell.argmax(dim=-1, keepdim=True)
    by_cell = by_cell.scatter_add(-1, best, bonus * by_cell.gather(-1, best))
    return by_cell.unflatten(-1, (CELL, CELL)).transpose(-3, -2).flatten(-4)


def run_mlp(view: View, tokens: Tensor) -> Tensor:
    """The pre-gate output (halves, n, M, D) of an MLP unit for some tokens (halves, n, M) of each row, paid for."""
    shift, scale, _ = view.modulation
    x = view.x.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, view.info.width))
    # The view made the modulation, which is counted with it.
    view.spend(view.unit.start, "mlp", np.arange(view.images), tokens.shape[-1] / view.info.tokens)
    return view.block.mlp(view.block.norm2(x) * (1 + scale) + shift)


class TopTokens(Policy):
    """A schedule of computed steps, and MLPs that run for their top tokens between them. Subclasses say when.

    A token's score is the attention that it received at the last computed step, normalised in its row, plus `aging` for
    every refresh since then that left it out. The best token of each 2 x 2 cell gets its score times 1 + `bonus`.
    """

    granularity = "step, token"
    split = "branch"
    inside = True
    predictor = Predictor("branches", order=0)
    bonus: float
    aging: float
    ratio: float

    def refreshes(self, info: RunInfo, layer: int) -> bool:
        """Whether the MLP of a block ever runs for some tokens, which then need scores."""
        return self.ratio > 0

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        return self.predictor if unit.branch == "attn" else None  # MLP outputs change token by token: kept here

    def begin(self, info: RunInfo) -> None:
        side = math.isqrt(info.tokens)
        if not info.corrected and (side * side != info.tokens or side % CELL):
            raise ValueError(f"{self.name} needs a square grid of even sides, and the model has {info.tokens} tokens")
        # By block: scores and ages (halves, n, T), and the MLP's pre-gate outputs (halves, n, T, D).
        self._received: dict[int, Tensor] = {}
        self._age: dict[int, Tensor] = {}
        self._mlp: dict[int, Tensor] = {}

    def computed(self, view: View, ran: Ran) -> None:
        layer = view.unit.start
        if view.info.corrected:
            return
        if view.unit.branch == "mlp":
            self._mlp[layer] = ran.branch_output
            return
        if not self.refreshes(view.info, layer):
            return
        received = received_attention(view.block, view.modulated().flatten(0, 1)).unflatten(0, view.x.shape[:2])
        tokens, width, rows = view.info.tokens, view.info.width, view.x.shape[0] * view.images
        view.spend_flops(rows * 2 * (2 * tokens * width * width + tokens * tokens * width))  # q and k, and their map
        self._received[layer], self._age[layer] = received, torch.zeros_like(received)

    def refresh(self, view: View, count: int) -> Tensor:
        """What the MLP unit adds before its gate, (halves, n, T, D), after its `count` top tokens were computed."""
        layer = view.unit.start
        if not self.refreshes(view.info, layer):
            return self._mlp[layer]
        score = with_bonus(self._received[layer] + self.aging * self._age[layer], self.bonus)
        fresh = score.topk(count, dim=-1).indices
        self._age[layer] = (self._age[layer] + 1).scatter(-1, fresh, 0.0)
        if count:
            index = fresh.unsqueeze(-1).expand(-1, -1, -1, view.info.width)
            self._mlp[layer] = self._mlp[layer].scatter(2, index, run_mlp(view, fresh))
        return self._mlp[layer]


class VaryingInterval(TopTokens):
    """Computed steps by the interval of ToCa, which varies along the trajectory unless `ratio` is 0."""

    every: int
    age_weight: float

    @property
    def aging(self) -> float:
        return self.age_weight / self.every

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._remainders = remainders(info.num_steps, self.every, self.ratio > 0)

    def remainder(self, view: View) -> int:
        """Steps left, modulo the interval, for the view's block; 0 where it runs for all tokens."""
        return self._remainders[view.step, min(view.unit.start, 1)]

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self.remainder(view) == 0)

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(self._remainders[view.step, 1] == 0)
