"""AdaCorrection (arXiv 2602.13357): cached sampling of diffusion transformers that watches its drift and corrects it.

from adacorr import AdaCorrection, CacheManager, make_policy

manager = CacheManager(correction=AdaCorrection())                      # or policy=make_policy("teacache"), or both
with manager.run(model, labels, timesteps, alpha_bar, cfg_scale=1.5) as run:
    for step in range(len(timesteps)):
        run.begin_step(step)
        out = model(x, t, y)
        ...                                                             # pipeline.sample_latents is the whole loop
print(manager.trace.compute, manager.trace.hit_rate)

Where to look:

    one run          manager makes it; run is what the loop sees; policy_run (a method alone), corrected_run
                     (AdaCorrection), short_run and outside (its steps, whole), literal (Algorithm 1 of the paper);
                     trace says what happened
    methods          policy and unit (what a method is and sees), policies/, by_image (state and measures), tokens and
                     top_tokens (methods by token)
    when to compute  offset and correct (the paper's Eq. 1-3, 6, 7, and options), control, schedules, placement
    the forecast     store and history (what is kept), gates, kriging, injected_noise, rewinds, linear_steps
    profiles         profile (files), model_profile and stack_profile (what AdaCorrection knows), calibration/
    models           model (what one must offer), integrations/diffusers, compiled and captured (--compile)
    small parts      spec (NAME:key=value), transfer (host and device), files, command, bench
"""

from adacorr.correct import AdaCorrection, Algorithm1, blend, correction_weight, parse_correction
from adacorr.manager import CacheManager
from adacorr.offset import innovation, offset_score, spatial_variation, temporal_deviation
from adacorr.policies import available, make_policy
from adacorr.policy import Cached, Policy, Predictor, Ran, RunInfo, View
from adacorr.run import CachedRun
from adacorr.trace import Trace
from adacorr.unit import Unit, by_branch

__all__ = [
    "AdaCorrection",
    "CacheManager",
    "CachedRun",
    "Cached",
    "Algorithm1",
    "Policy",
    "Predictor",
    "Ran",
    "RunInfo",
    "Trace",
    "Unit",
    "View",
    "available",
    "blend",
    "by_branch",
    "correction_weight",
    "innovation",
    "make_policy",
    "offset_score",
    "parse_correction",
    "spatial_variation",
    "temporal_deviation",
]
