"""`enable` and what it gives back."""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from adacorr.integrations.diffusers.attach import HOOK, Attachment
from adacorr.integrations.diffusers.blocks import GatedBlock, argument_names
from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.families import Family, family_of
from adacorr.policy import Policy

_CACHES = "_adacorr_caches"


def enable(pipe: Any, config: CacheConfig | None = None, *, component: str = "transformer") -> Handle:
    """Attach a cache to a diffusers pipeline, or to a bare transformer; until `Handle.disable`.

    component: which of the pipeline's transformers ("transformer_2" of some). Raises ValueError, before anything is
    changed, for a model, scheduler or configuration that cannot be served, RuntimeError where a cache is
    attached already.
    """
    config = config or CacheConfig()
    if config.model_id is None and (known := getattr(getattr(pipe, "config", None), "checkpoint_sha256", None)):
        config = replace(config, model_id=known)
    bare = isinstance(pipe, nn.Module)
    transformer = pipe if bare else getattr(pipe, component, None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no {component} to cache")
    family = family_of(transformer)
    check_transformer(transformer, family)
    check_config(config, family)
    has_steps = config.num_steps is not None or config.timesteps is not None
    if bare and not has_steps:
        raise ValueError("a bare transformer needs num_steps or timesteps in the configuration; or give the pipeline")
    if bare and config.guidance == "separate" and config.guidance_scale is None:
        raise ValueError("a bare transformer whose guidance halves are called apart needs their guidance_scale")
    if has_steps and not bare:
        raise ValueError("num_steps and timesteps are for a bare transformer; the pipeline's scheduler has its own")
    if not bare and getattr(pipe.scheduler, "order", 1) != 1:
        name = type(pipe.scheduler).__name__
        raise ValueError(f"{name} calls the network more than once in a step: take a scheduler of first order calls")
    attachment = Attachment(transformer, family, config, None if bare else pipe, component)
    attachment.install()
    return Handle(attachment)


class Handle:
    """A cache that is attached; leaving its `with` block disables it."""

    def __init__(self, attachment: Attachment):
        self.config, self._attachment, self.enabled = attachment.config, attachment, True
        if attachment.pipe is not None:
            _watch(attachment.pipe, attachment)

    def stats(self) -> dict[str, Any]:
        """Of the newest run: compute (share of the block FLOPs), hit_rate, evaluations, rewound (steps of images that
        were taken again), fallbacks, bytes, and `trace`, a summary.

        `runs`, and by their reasons `bypassed` calls and runs that are `not_rewound`, count since `enable`.
        """
        own = self._attachment
        trace, sampling = own.manager.trace, own.sampling
        begun = trace is not None and trace.done > 0
        return {
            "compute": trace.compute if begun else 1.0,
            "hit_rate": trace.hit_rate if begun else 0.0,
            "evaluations": trace.flops / trace.evaluation_flops if begun else 0.0,
            "rewound": trace.rewound if begun else 0,
            "fallbacks": trace.fallbacks if begun else 0,
            "bytes": own.manager.bytes if sampling is None else sampling.run.bytes,
            "runs": own.runs,
            "bypassed": dict(own.bypassed),
            "not_rewound": dict(own.not_rewound),
            "trace": trace.summary() if begun else {},
        }

    def reset(self) -> None:
        """Forget the run under way, for a loop of one's own that was left early."""
        self._attachment.reset()

    def disable(self) -> None:
        """Take the cache off; the transformer and the pipeline are as they were. A second call does nothing."""
        if not self.enabled:
            return
        self.enabled, own = False, self._attachment
        own.remove()
        if own.pipe is not None:
            _unwatch(own.pipe, own)
        own.transformer = own.pipe = own.stack = None  # statistics may outlive the model

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.disable()


# ------------------------------------------------------------------------------------------- the pipeline's call


def _watch(pipe: Any, attachment: Attachment) -> None:
    """Tell the attachment of the pipeline's calls. Python looks `pipe(...)` up in the class, so it gets its own."""
    if _CACHES not in vars(pipe):
        kind = type(pipe)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(kind.__call__).bind(self, *args, **kwargs)
            bound.apply_defaults()
            caches = list(vars(self)[_CACHES])
            try:
                for cache in caches:
                    cache.begin_call(bound.arguments)
                return kind.__call__(self, *args, **kwargs)
            finally:
                for cache in caches:
                    cache.end_call()

        own = {"__call__": call, "__reduce_ex__": Attachment.__reduce_ex__}
        own |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
        object.__setattr__(pipe, _CACHES, [])
        object.__setattr__(pipe, "__class__", type(kind.__name__, (kind,), own))
    vars(pipe)[_CACHES].append(attachment)


def _unwatch(pipe: Any, attachment: Attachment) -> None:
    vars(pipe)[_CACHES].remove(attachment)
    if not vars(pipe)[_CACHES]:
        del vars(pipe)[_CACHES]
        object.__setattr__(pipe, "__class__", type(pipe).__mro__[1])


# ------------------------------------------------------------------------------------------------------- checks


def check_transformer(transformer: nn.Module, family: Family) -> None:
    """ValueError for a transformer that is not as the family says, RuntimeError for one with a cache."""
    name = type(transformer).__name__
    if len(set((getattr(transformer, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"{name} lies on several devices (device_map), and the cache needs its blocks on one")
    if transformer._compiled_call_impl is not None:
        raise ValueError(f"{name} is compiled as a whole, by its compile(): compile its blocks, or give compile=True")
    for attribute in family.lists:
        blocks = getattr(transformer, attribute, None)
        if not blocks and attribute == family.lists[0]:
            raise ValueError(f"{name} has no blocks in {attribute}, so there is nothing to cache")
        for block in blocks or ():
            if argument_names(type(block))[:1] != ("hidden_states",):
                version = importlib.metadata.version("diffusers")
                raise ValueError(f"{type(block).__name__} of diffusers {version} takes other arguments than are known")
    for module in transformer.modules():
        for hook_name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if hook_name == HOOK:
                raise RuntimeError(f"a cache is attached to this {name} already: disable() its handle first")
            if hook._is_stateful:
                raise RuntimeError(f"another cache ({hook_name}) is on this {name}: take it off first")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "the transformer runs under context or tensor parallelism, where its shards would decide apart: cache it "
            "on one device, with different images on each"
        )


def check_config(config: CacheConfig, family: Family) -> None:
    """ValueError for a method that the family's blocks cannot serve."""
    manager = config.manager(profile=False)
    policy, alone = manager.policy, manager.correction is None
    if policy is None:
        return
    if policy.name == "fastcache" and alone and policy.tau and not issubclass(family.block, GatedBlock):
        raise ValueError(f"fastcache:tau={policy.tau:g} runs blocks for some tokens, and these need all: give tau=0")
    if policy.name == "precisecache" and not issubclass(family.block, GatedBlock):
        raise ValueError("precisecache runs blocks for averages of tokens, which the blocks of this class cannot place")
    if alone and policy.inside and not hasattr(family.block, "attn"):
        raise ValueError(
            f"{policy.name} looks inside the layers of a DiT block, which the blocks of this class are not"
        )
    if getattr(policy, "profile", None) == "auto" and config.model_id is None:
        raise ValueError(
            f"{policy.name} needs a profile of the model, and finds it by the checkpoint: give its sha256 as model_id, "
            f"or {policy.name}:profile=FILE, or profile=none where the method works without one"
        )
    if alone and type(policy).network_output is not Policy.network_output:
        raise ValueError(
            f"{policy.name} changes what the network gives, and here the pipeline takes it: use it with adacorr, or by "
            "sample.py"
        )
