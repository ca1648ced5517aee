"""ToCa (arXiv 2410.05317; release: Shenyi-Z/ToCa, DiT-ToCa): between computed steps, MLPs run for their top tokens."""

from dataclasses import dataclass

from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Cached, Knob, View, option
from adacorr.top_tokens import RATIOS, VaryingInterval, fresh_count


@register
@dataclass
class ToCa(VaryingInterval):
    """Compute a step in `every` or so; between them hold attention and run the MLPs for a few tokens (ToCa).

    every       N: interval of computed steps in the middle of the run; the release's README has 3 for 50 DDIM steps
    ratio       share of fresh tokens; README: 0.07. 0 is FORA, as released: no token, one interval
    ratios      how that share varies with step and block: ddim50 or ddpm250, the two of the README
    age_weight  lambda_3, of the refreshes since a token was fresh, over N, in its score; README: 0.25

    With i of S steps left, the interval is round(N / (1.4 - .8 i / S)), but 2 for i from .2 S to .4 S; a step is
    computed if the interval divides i. The first step is. Otherwise each MLP runs for ratio * 2.5 * (3 - 4 i / S) *
    (.8 + .4 block / last block) of a row's tokens (ddim50): those of the largest attention received, plus age_weight *
    age / N, times 1.6 for the best of each 2 x 2 cell. Their outputs go into the cache. Guidance halves choose alone.

    Departures: none in the rule. A step that changes its interval after block 0 may compute that block only, as
    released. Fused attention has no map, so the map is made again here. Compute counts that: 18 % of a computed
    block (XL/2, 256 tokens), which the release's own, slower attention does not need.
    Stored for each image and half: the pre-gate outputs of both branches of all blocks, and a score and an age a token.
    """

    every: int = option(3, low=1)
    ratio: float = option(0.07, low=0, high=1)
    ratios: str = option("ddim50", choices=tuple(RATIOS))
    age_weight: float = option(0.25, low=0)

    bonus = 0.6
    knob = Knob("every", 2, 25, ("", "ratio=0.03", "ratio=0.15"))

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if view.unit.branch == "attn":
            return cached.forecast
        return self.refresh(view, fresh_count(view.info, view.step, view.unit.start, self.ratio, self.ratios))
