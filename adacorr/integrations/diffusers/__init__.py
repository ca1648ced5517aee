"""AdaCorrection on the transformers of diffusers.

from adacorr.integrations.diffusers import CacheConfig, enable

with enable(pipe, CacheConfig(adacorr="gamma=2")) as cache:
    image = pipe("a lighthouse at dusk").images[0]
    print(cache.stats()["compute"])

measure(pipe, [{"prompt": "a lighthouse at dusk"}, {"prompt": "two cats"}], "own.safetensors")
enable(pipe, CacheConfig(adacorr="gamma=2", profile="own.safetensors"))     # closer to the uncached image
"""

from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.handle import Handle, enable
from adacorr.integrations.diffusers.measuring import measure
from adacorr.integrations.diffusers.pixel import PixelDiTPipeline
from adacorr.integrations.diffusers.published import apply_cache_on_transformer

__all__ = ["CacheConfig", "Handle", "PixelDiTPipeline", "apply_cache_on_transformer", "enable", "measure"]
