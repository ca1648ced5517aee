"""The call that the README of the method's authors shows, on this cache."""

from __future__ import annotations

from typing import Any

from torch import nn

from adacorr.integrations.diffusers.blocks import GatedBlock
from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.families import family_of
from adacorr.integrations.diffusers.handle import Handle, enable
from adacorr.spec import hint, spell_value

# Their names of methods -> ours, and the options that each takes: theirs -> ours.
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "Fast": ("fastcache", {"rel_l1_thresh": "threshold", "motion_threshold": "tau"}),
    "Tea": ("teacache", {"rel_l1_thresh": "threshold"}),
    "Ada": ("adacache", {}),
    "Fb": ("first_block", {"rel_l1_thresh": "threshold"}),
    "Lazy": ("lazydit", {"rel_l1_thresh": "threshold"}),
}
PROFILED = ("fastcache", "teacache")  # which do without a profile of the model, if they are told to


def method_spec(transformer: nn.Module, name: str, thresholds: dict[str, float], model_id: str | None) -> str:
    """The spec of a method under the authors' name and thresholds, for a transformer.

    Without a model_id methods run without a profile of the model. FastCache passes all tokens through blocks that are
    cached as a whole. ValueError for an unknown name, or a threshold that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"use_cache={name!r} is unknown{hint(name, METHODS)}; there are {', '.join(METHODS)} and None")
    method, known = METHODS[name]
    for theirs, value in thresholds.items():
        if theirs not in known:
            raise ValueError(f"{theirs}={value} means nothing to use_cache={name!r}; leave it out")
    options: dict[str, Any] = {known[theirs]: value for theirs, value in thresholds.items()}
    if method in PROFILED and model_id is None:
        options["profile"] = None
    if method == "fastcache" and not issubclass(family_of(transformer).block, GatedBlock):
        options.setdefault("tau", 0)
    text = ",".join(f"{key}={spell_value(value)}" for key, value in options.items())
    return f"{method}:{text}" if text else method


def apply_cache_on_transformer(
    transformer: Any,
    use_cache: str | None = "Fast",
    rel_l1_thresh: float | None = None,
    motion_threshold: float | None = None,
    enable_adacorrection: bool = True,
    adacorr_gamma: float = 1.0,
    adacorr_lambda: float = 1.0,
    return_hidden_states_first: bool | None = None,
    num_steps: int | None = None,
    model_id: str | None = None,
) -> Handle:
    """`enable` under the arguments of the authors' README.

    transformer                   or a pipeline, whose scheduler then says the steps
    use_cache                     Fast, Tea, Ada, Fb or Lazy, or None for AdaCorrection alone
    rel_l1_thresh                 the method's threshold, None for its default
    motion_threshold              FastCache's tau, None for its default
    enable_adacorrection          whether AdaCorrection corrects the method
    adacorr_gamma, adacorr_lambda of Eq. 6 and 3
    return_hidden_states_first    whether blocks return the image tokens first; known of every class, so a value that
                                  contradicts it is refused
    num_steps                     sampling steps of a run, for a bare transformer
    model_id                      sha256 of the checkpoint, for methods with a profile of it

    ValueError for arguments that are unknown or contradict each other, and as `enable`.
    """
    model = transformer if isinstance(transformer, nn.Module) else transformer.transformer
    first = family_of(model).returns != "text, image"
    if return_hidden_states_first not in (None, first):
        name = type(model).__name__
        raise ValueError(f"return_hidden_states_first={return_hidden_states_first} is wrong for {name}: leave it out")
    correction = f"gamma={adacorr_gamma},lambda={adacorr_lambda}" if enable_adacorrection else None
    if correction is None and (adacorr_gamma, adacorr_lambda) != (1.0, 1.0):
        raise ValueError(
            "enable_adacorrection=False leaves adacorr_gamma and adacorr_lambda no meaning: leave them out"
        )
    thresholds = {"rel_l1_thresh": rel_l1_thresh, "motion_threshold": motion_threshold}
    thresholds = {name: value for name, value in thresholds.items() if value is not None}
    if use_cache is None:
        if correction is None:
            raise ValueError("use_cache=None with enable_adacorrection=False caches nothing; give one of the two")
        if thresholds:
            raise ValueError(f"{next(iter(thresholds))} means nothing with use_cache=None; leave it out")
    spec = None if use_cache is None else method_spec(model, use_cache, thresholds, model_id)
    return enable(transformer, CacheConfig(adacorr=correction, cache=spec, num_steps=num_steps, model_id=model_id))
