"""One model on one noise: runs settings on it, and measures what they spend, how close they come and their time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from adacorr import Algorithm1, CacheManager, make_policy
from adacorr.command import timed
from diffusion import make_sampler
from evaluate.fidelity import fidelity
from pipeline import Pipeline, check_finite
from profiles import with_profile

NEAR = 0.03  # computes that differ by this share count as equal
REACHED = 0.2  # a compute that is off by more than this share does not stand for a level
WARM_UP = 4  # steps, before something is timed
TIMED = 2  # uncached steps that the time of a row is set against


@dataclass(frozen=True)
class Setting:
    """One way to sample: the specs of --cache and --adacorr, and a sampler with its steps in place of the bench's."""

    cache: str | None = None
    adacorr: str | None = None
    sampler: str | None = None
    steps: int | None = None

    @classmethod
    def of(cls, spec: str) -> Setting:
        """The setting of a `CacheManager.spec`: "teacache:threshold=0.2+adacorr:gamma=2", "adacorr", "literal".

        ValueError for a method, option or value that there is not.
        """
        corrected = re.fullmatch(r"(?:(.+)\+)?adacorr(?::(.*))?", spec)
        if corrected:
            setting = cls(corrected[1], corrected[2] or "")
        else:
            setting = cls(None, spec) if spec.partition(":")[0] == "literal" else cls(spec)
        CacheManager.of(setting.cache, setting.adacorr)
        return setting

    @property
    def named(self) -> str:
        """The setting in a table, with what its method has to remark."""
        remark = "" if self.cache is None else make_policy(self.cache).remark
        return f"`{self}` ({remark})" if remark else f"`{self}`"

    def __str__(self) -> str:
        flags = ("--cache", self.cache), ("--adacorr", self.adacorr)
        flags += ("--sampler", self.sampler), ("--num-sampling-steps", self.steps)
        return " ".join(f"{flag} {value}".strip() for flag, value in flags if value is not None)


@dataclass
class Row:
    """What ran, what it spent, how close it came. PSNR and SSIM hold mean, p5 and min."""

    method: str
    form: str  # alone, adacorr or fewer steps
    level: float | None  # compute level that it stands for
    setting: Setting
    images: int
    compute: float
    hit_rate: float
    psnr: dict[str, Any]
    ssim: dict[str, Any]
    solution_psnr: dict[str, Any] | None = None
    bytes_per_image: int = 0
    weights_at_1: float | None = None  # literal form: share of its weights that are 1
    speedup: float | None = None

    @property
    def score(self) -> float:
        """Mean PSNR in dB."""
        return float(self.psnr["mean"])

    def plain(self) -> dict[str, Any]:
        """The row for JSON."""
        return {**vars(self), "setting": {k: v for k, v in vars(self.setting).items() if v is not None}}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Row:
        """The row that `plain` describes."""
        return cls(**{**plain, "setting": Setting(**plain["setting"])})


Rows = dict[tuple[Setting, int], Row]  # by setting and number of images


@dataclass
class Bench:
    """The model, the noise and both references; runs settings and remembers their rows.

    solution_steps  of DDIM, the reference of `solution_psnr`; 0 leaves it out
    few             images that settings are searched on, the first of all
    calibrate       what AdaCorrection is to know of the model: see `profiles.with_profile`
    timed           rows on all images get their speed-up, from one run and TIMED uncached steps right before it
    """

    pipe: Pipeline
    seed: int
    count: int
    solution_steps: int = 0
    few: int = 1
    calibrate: str = "auto"
    timed: bool = False
    rows: Rows = field(default_factory=dict)

    @property
    def references(self) -> dict[str, Setting]:
        """What the rows are measured against, by the name of the attribute."""
        solution = {"solution": Setting(sampler="ddim", steps=self.solution_steps)} if self.solution_steps else {}
        return {"reference": Setting()} | solution

    @cached_property
    def reference(self) -> Tensor:
        """Images (count, H, W, 3) uint8 of the uncached run."""
        return self.images(self.references["reference"])

    @cached_property
    def solution(self) -> Tensor:
        """Those of DDIM with `solution_steps`."""
        return self.images(self.references["solution"])

    def images(self, setting: Setting, first: int = 0, count: int | None = None) -> Tensor:
        """Images (count, H, W, 3) uint8 of a setting from `first` on, all by default."""
        return self.pipe.decode(self.sample(setting, count, first=first)[0])

    def cache(self, setting: Setting, pipe: Pipeline | None = None) -> CacheManager | None:
        """A fresh cache of a setting, with what is known of the model; None without one."""
        cache = CacheManager.of(setting.cache, setting.adacorr)
        return with_profile(cache, pipe or self.pipe, self.calibrate)

    def sample(
        self, setting: Setting, count: int | None = None, stop: int | None = None, first: int = 0
    ) -> tuple[Tensor, CacheManager | None, float]:
        """(final states, cache with its trace, seconds) of `count` images from `first` on, of all by default."""
        indices, pipe = np.arange(first, first + (count or self.count)), self.pipe
        if setting.sampler is not None:
            pipe = replace(pipe, sampler=make_sampler(setting.sampler, setting.steps))
        labels, cache = pipe.labels_in_turn(indices), self.cache(setting, pipe)
        x, seconds = timed(lambda: pipe.sample(self.seed, indices, labels, cache, stop=stop), pipe.device)
        if stop is None and setting in self.references.values():  # else a black image would be a perfect match
            check_finite(x)
        return x, cache, seconds

    def run(self, method: str, form: str, setting: Setting, few: bool = False) -> Row:
        """The row of a setting, on all images or on a few; what ran before is not run again."""
        count = self.few if few else self.count
        if (setting, count) in self.rows:
            return self.rows[setting, count]
        # The same row, whoever asks for it: a search on as many images as there are leaves its rows for the table.
        own, timed = self.pipe.sampler.num_steps, self.timed and count == self.count
        reference = self.reference[:count]  # before anything is timed: its run is the warm-up
        uncached = self.sample(Setting(), stop=TIMED)[2] / TIMED * own if timed else 0.0
        x, cache, seconds = self.sample(setting, count)
        images = self.pipe.decode(x)
        near = fidelity(reference, images)
        scores = _summary(near["psnr"]), _summary(near["ssim"])
        row = Row(method, form, None, setting, count, (setting.steps or own) / own, 0.0, *scores)
        row.speedup = uncached / seconds if timed else None
        if self.solution_steps:
            row.solution_psnr = _summary(fidelity(self.solution[:count], images)["psnr"])
        if cache is not None:
            trace = cache.trace
            row.compute, row.hit_rate, row.bytes_per_image = trace.compute, trace.hit_rate, cache.bytes // count
            if isinstance(cache.correction, Algorithm1):
                row.weights_at_1 = float((trace.weight[1:] == 1).mean())
        self.rows[setting, count] = row
        return row


def _summary(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("mean", "p5", "min")}
