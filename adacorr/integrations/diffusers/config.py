"""What `enable` takes: the core's configuration and what the transformer alone does not tell."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from adacorr.command import CACHE_DTYPES
from adacorr.files import written_whole
from adacorr.integrations.diffusers.families import LAYOUTS
from adacorr.manager import CacheManager
from adacorr.profile import load_profile
from adacorr.spec import check_options, option

VERSION = 1  # of the JSON form


@dataclass(frozen=True)
class CacheConfig:
    """A cache for one diffusers transformer. ValueError for a value out of range or options that contradict.

    adacorr         AdaCorrection's options as --adacorr takes them ("gamma=2", "budget=8"), "" for its defaults,
                    "literal" for the paper's Algorithm 1, None for `cache` alone
    cache           a caching method as --cache takes it ("teacache:threshold=0.2"), or None for AdaCorrection alone
    dtype           of the stored tensors: fp32, bf16, fp16 or int8
    profile         file of a profile, for AdaCorrection: one that `measure` wrote, or one of the bundled model
    model_id        sha256 of the checkpoint that profiles are held to, this one and those of calibrated methods; None
                    takes what the pipeline's own config says of it (PixelDiTPipeline), if anything
    guidance_scale  None takes it from the pipeline's call; needed for a bare transformer that gets both guidance halves
    guidance        where the halves are: cond_first or uncond_first in one batch, separate in calls of their own, cond
                    first; None takes the layout of the class's own pipelines
    num_steps, timesteps  of a bare transformer, one of them: the sampling timesteps in 0..1000, falling from noise to
                    image, or their number where they are even
    compile         run the blocks through torch.compile
    """

    adacorr: str | None = ""
    cache: str | None = None
    dtype: str = option("fp32", choices=tuple(CACHE_DTYPES))
    profile: str | None = None
    model_id: str | None = None
    guidance_scale: float | None = option(None, low=0, high=100)
    guidance: str | None = option(None, choices=(None, *LAYOUTS))
    num_steps: int | None = option(None, low=1, high=1000)
    timesteps: tuple[float, ...] | None = None
    compile: bool = False

    def __post_init__(self):
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
            falls = all(a > b for a, b in pairwise(self.timesteps))
            if not self.timesteps or not falls or not all(0 <= t <= 1000 for t in self.timesteps):
                raise ValueError("timesteps must fall from noise to image within 0..1000, each once")
            if self.num_steps not in (None, len(self.timesteps)):
                raise ValueError(f"num_steps={self.num_steps} contradicts {len(self.timesteps)} timesteps; give one")
        check_options("CacheConfig", self)
        self.manager(profile=False)

    def manager(self, profile: bool = True) -> CacheManager:
        """The core's cache; with `profile` its file is read, too. ValueError for what it refuses."""
        made = CacheManager.of(self.cache, self.adacorr, CACHE_DTYPES[self.dtype])
        if made is None:
            raise ValueError("adacorr and cache are both None: give one of them")
        return made if self.profile is None or not profile else made.knowing(load_profile(self.profile))

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CacheConfig:
        """ValueError for text of another form, an unknown key or a bad value."""
        try:
            values = dict(json.loads(text))
            version = values.pop("version", None)
            made = cls(**values) if version == VERSION else None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no cache configuration in JSON: {error}") from error
        if made is None:
            raise ValueError(f"a cache configuration of version {version!r}; this one reads version {VERSION}")
        return made

    def save(self, path: str | Path) -> None:
        """As JSON; the file appears whole or not at all."""
        with written_whole(path) as partial:
            partial.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CacheConfig:
        """ValueError as `from_json`, OSError for a file that cannot be read."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
