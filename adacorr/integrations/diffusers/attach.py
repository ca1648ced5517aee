"""The cache on one transformer: hooks on it and on its blocks, and the runs behind them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from adacorr import compiled
from adacorr.corrected_run import CorrectedRun
from adacorr.integrations.diffusers.blocks import argument_names
from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.families import KEYWORDS, Family
from adacorr.integrations.diffusers.rewinding import APART, Rewinding
from adacorr.integrations.diffusers.rows import Rows
from adacorr.integrations.diffusers.schedule import Grid, sampler_of, time_of
from adacorr.integrations.diffusers.stack import Stack
from adacorr.linear_steps import LinearSteps, linear_steps, scheduler_step
from adacorr.manager import CacheManager
from adacorr.run import CachedRun

HOOK = "adacorr"


class ContextName(StateManager):
    """The name that `cache_context` gave the call: "cond", "uncond", ...; None outside of one."""

    def __init__(self):
        super().__init__(None)
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = context if context is None or isinstance(context, str) else context.name

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.name = None


class BlockHook(ModelHook):
    """Stands in for a block's forward: the first block runs the whole stack, the others pass its result on."""

    _is_stateful = True  # so that contexts and resets of diffusers reach it

    def __init__(self, attachment: Attachment, first: bool):
        super().__init__()
        self.attachment, self.first, self.context = attachment, first, ContextName()
        self.compiled: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.attachment.enter(self, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward without this hook."""
        return (self.compiled or self.fn_ref.original_forward)(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.context.reset()
        self.attachment.reset()
        return module


@dataclass
class Stream:
    """One sampling run: of a whole batch, or of one guidance half where these are called apart.

    manager has its trace; run is None once it is over, since its tensors are large.
    """

    manager: CacheManager
    run: CachedRun | None
    grid: Grid
    key: tuple
    rewinding: Rewinding | None = None
    step: int = -1
    time: float = float("inf")

    @property
    def bytes(self) -> int:
        """Bytes of stored tensors."""
        return self.manager.bytes if self.run is None else self.run.bytes

    def close(self) -> None:
        """The run is over: its statistics stay, and no tensor."""
        self.manager.bytes, self.run, self.rewinding = self.bytes, None, None


class Attachment:
    """One transformer under a cache, from `install` to `remove`.

    guidance_scale  of the pipeline's call that is under way, or None
    not_rewound     why runs go on without rewinding, and how many
    observe         what looks at each step of a run: (stream, rows that it began with, output)
    """

    def __init__(self, transformer: nn.Module, family: Family, config: CacheConfig, pipe: Any = None):
        self.transformer, self.family, self.config, self.pipe = transformer, family, config, pipe
        self.manager = config.manager()
        self.layout = config.guidance or family.layout
        self.cond_first = self.layout != "uncond_first"
        self.guidance_scale: float | None = None
        self.stack: Stack | None = None
        self.streams: dict[str, Stream] = {}
        self.finished: dict[str, Stream] = {}  # those of the last run, for its statistics
        self.runs = 0
        self.bypassed: Counter[str] = Counter()
        self.not_rewound: Counter[str] = Counter()
        self.observe: Callable[[Stream, Tensor, Tensor], None] | None = None
        self._given: dict[str, Any] | None = None  # arguments of the call under way, where the cache takes it
        self._result: Any = None
        self._now: Stream | None = None  # that of the call under way
        self._replayed: np.ndarray | None = None  # rows of the call for which a step is taken again
        self._undo = ExitStack()

    # ------------------------------------------------------------------ hooks

    def install(self) -> None:
        """Put the hooks on; on an exception none stays."""
        modules = [block for name in self.family.lists for block in getattr(self.transformer, name)]
        with ExitStack() as undo:
            hooks = [self._hook(module, module is modules[0], undo) for module in modules]
            self.stack = Stack(self.transformer, self.family, modules, [hook.forward for hook in hooks])
            for block in self.stack.blocks:
                undo.callback(block.remove)
            # torch's own hooks: those of diffusers and accelerate on a whole model replace each other.
            undo.enter_context(self.transformer.register_forward_pre_hook(self._before, with_kwargs=True))
            undo.enter_context(self.transformer.register_forward_hook(self._after, always_call=True))
            self._undo = undo.pop_all()
        self._renew_registries()

    def remove(self) -> None:
        """Take the hooks off; the modules are as they were found."""
        self._undo.close()
        self._renew_registries()
        self.reset()

    def _hook(self, module: nn.Module, first: bool, undo: ExitStack) -> BlockHook:
        own_forward, own_registry = "forward" in vars(module), hasattr(module, "_diffusers_hook")
        own_call = module._compiled_call_impl
        registry, hook = HookRegistry.check_if_exists_or_initialize(module), BlockHook(self, first)

        def take_off() -> None:
            registry.remove_hook(HOOK, recurse=False)  # nothing, if it is not there
            if own_call is not None:
                module._compiled_call_impl = own_call
            if not registry.hooks and not own_forward:
                vars(module).pop("forward", None)
            if not registry.hooks and not own_registry:
                del module._diffusers_hook

        undo.callback(take_off)
        registry.register_hook(hook, HOOK)
        if own_call is not None:
            # A compiled block would trace its way into the cache: the graph is made of what lies behind the hook.
            module._compiled_call_impl = None
        if self.config.compile or own_call is not None:
            hook.compiled = torch.compile(hook.fn_ref.original_forward, backend=compiled.BACKEND)
        return hook

    def _renew_registries(self) -> None:
        """Registries remember their children, so that contexts would not reach new hooks."""
        for module in self.transformer.modules():
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook._child_registries_cache = None

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The transformer is called: see whether the cache takes the call."""
        names = argument_names(type(module))
        given = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
        self._given = self._result = self._now = None
        if why := self._outside(given):
            self.bypassed[why] += 1
            for stream in self.streams.values():  # guidance by a further call
                self._note(stream, f"calls with {why}")
        else:
            self._given = given

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, out: Any) -> None:
        """The call is over: past steps are taken again, if it is time. One that failed leaves no state: out is None."""
        if out is None:
            self.reset()
        elif self._now is not None:
            stream, rows = self._now, self._given["hidden_states"]
            with self._state_or_none():
                if stream.rewinding is not None:
                    self._note(stream, stream.rewinding.correct(rows, out[0], self.replay))
                if self.observe is not None:
                    self.observe(stream, rows, out[0])
        self._given = self._result = self._now = None

    @contextmanager
    def _state_or_none(self) -> Iterator[None]:
        """What changes the state of a run, without gradients; where it fails, the run is over."""
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self.reset()
            raise

    def _note(self, stream: Stream, why: str) -> None:
        """A run that rewinds goes on without it if there is a reason."""
        if why and isinstance(stream.run, CorrectedRun) and stream.run.rewinds:
            self.not_rewound[why] += 1
            stream.rewinding, stream.run.rewinds = None, False

    def replay(self, step: int, rows: Tensor, images: np.ndarray) -> Tensor:
        """The transformer's output for other rows at a step up to this one, of which those of `images` count."""
        rewinding = self._now.rewinding
        self._replayed = rewinding.rows_of(images)
        try:
            return self._forward(self._given, hidden_states=rows, timestep=rewinding.timesteps[step])
        finally:
            self._replayed = None

    def uncached(self, rows: Tensor) -> Tensor:
        """The transformer's output for other rows at this step; all blocks run."""
        given, self._given = self._given, None
        try:
            return self._forward(given, hidden_states=rows)
        finally:
            self._given = given

    def _forward(self, given: dict[str, Any], **others: Any) -> Tensor:
        """The output for the arguments of a call, with others in their place."""
        known = {name: value for name, value in given.items() if value is not None}
        return self.transformer.forward(**known | others | {"return_dict": False})[0]

    def _outside(self, given: dict[str, Any]) -> str:
        """Why a call runs uncached; empty if it does not."""
        for name in self.family.bypass:
            if given.get(name) is not None:
                return name
        for name in KEYWORDS:
            if any(not isinstance(value, (int, float, str)) for value in (given.get(name) or {}).values()):
                return name
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise RuntimeError("context or tensor parallelism was enabled under the cache: disable() it first")
        return ""

    @torch.compiler.disable
    def enter(self, hook: BlockHook, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block of a hook is called."""
        if self._given is None:
            return hook.forward(*args, **kwargs)
        if hook.first:
            with self._state_or_none():
                self._result = self._run(args, kwargs, hook.context.name)
            if self._result is None:  # no step of a run: the call goes on without the cache
                self._given = None
                return hook.forward(*args, **kwargs)
        return self._result

    # ------------------------------------------------------------------ runs

    def reset(self) -> None:
        """Forget the run under way; its statistics stay."""
        for stream in self.streams.values():
            stream.close()
        if self.streams:
            self.finished, self.streams = self.streams, {}

    def _run(self, args: tuple, kwargs: dict[str, Any], context: str | None) -> Any:
        """The whole stack for the first block's call -> what its last block would give."""
        full = {**dict(enumerate(args)), **kwargs}
        x, start = full[0 if 0 in full else "hidden_states"], 0
        if self.family.joint:
            text = full[1 if 1 in full else "encoder_hidden_states"]
            x, start = torch.cat([text, x], dim=1), text.shape[1]
        x = self._step(x, full, start, context) if self._replayed is None else self._add_replayed(x)
        if x is None or not self.family.joint:
            return x
        text, image = x[:, :start], x[:, start:]
        return (image, text) if self.family.returns == "image, text" else (text, image)

    def _step(self, x: Tensor, full: dict[Any, Any], text: int, context: str | None) -> Tensor | None:
        """The stack for tokens x (rows, T, D), of which `text` are of text, at the step that the call belongs to."""
        c = Rows.of(full, self.stack.blocks[0].keys(self.family.by_row), len(x), text)
        self.stack.describe(x, c, self._given)
        time = time_of(self._given["timestep"], self.family)
        name, order = context or self._ordinal(time), None
        halves = self._halves(name, len(x), time)
        if halves == 2 and not self.cond_first:  # the core wants the conditional half first
            order = torch.arange(len(x), device=x.device).roll(len(x) // 2)
            x, c = x[order], c[order]
        stream = self._stream(x, c, halves, name, time)
        if stream is None:
            return None
        if stream.rewinding is not None:
            self._note(stream, stream.rewinding.begin(self._given["hidden_states"], self._given["timestep"]))
        self._now = stream
        stream.run.begin_step(stream.step)
        x = stream.run.run_blocks(self.stack.blocks, x, c)
        return x if order is None else x[order]  # a swap of halves undoes itself

    def _add_replayed(self, x: Tensor) -> Tensor:
        """The stack where a step is taken again: what is known that it adds, in the rows that it is known of."""
        rows = torch.from_numpy(self._replayed).to(x.device)
        return x.index_copy(0, rows, self._now.run.run_blocks(self.stack.blocks, x[rows], None))

    @property
    def scheduler(self) -> Any:
        """The pipeline's, or None."""
        return None if self.pipe is None else self.pipe.scheduler

    def linear_steps(self, grid: Grid, *, remembers: bool = True) -> LinearSteps | None:
        """Those of the pipeline's scheduler on a grid, as `adacorr.linear_steps` finds them."""
        scheduler, advance = self.scheduler, getattr(self.pipe, "advance", scheduler_step)
        return linear_steps(scheduler, scheduler.timesteps[-len(grid.timesteps) :], advance, remembers=remembers)

    def _halves(self, name: str, rows: int, time: float) -> int:
        """2 where the call's rows are both guidance halves of each image; looked at once in a run."""
        scale = self._scale()
        if self.layout == "separate" or scale is None or scale <= 1.0 or rows % 2:
            return 1
        if (stream := self.streams.get(name)) is not None and time < stream.time:  # a run's timesteps fall
            trace = stream.manager.trace
            if rows == trace.halves * trace.images:
                return trace.halves
        return 2 if self._is_doubled() else 1

    def _is_doubled(self) -> bool:
        """Whether both halves of the batch are the same images, and one of them has the null label, where there is one.

        Other kinds of guidance stack other things.
        """
        if not torch.equal(*self._given["hidden_states"].chunk(2)):
            return False
        if not self.stack.num_classes:
            return True
        first, second = self._given["class_labels"].chunk(2)
        null = second if self.cond_first else first
        return bool((null == self.stack.num_classes).all())

    def _scale(self) -> float | None:
        return self.guidance_scale if self.config.guidance_scale is None else self.config.guidance_scale

    def _stream(self, x: Tensor, c: Rows, halves: int, name: str, time: float) -> Stream | None:
        """The run that the call belongs to, at its step; a new one where the call does not follow on."""
        key = (x.shape, x.dtype, x.device, c.text, halves, self._scale())
        stream = self.streams.get(name)
        if stream is None or stream.key != key or not stream.grid.follows(stream.step, stream.time, time):
            grid = Grid.of(time, self.family, self.config, self.scheduler)
            if grid is None:
                self.bypassed["a timestep that is none of the scheduler's"] += 1
                return None
            if stream is not None:
                self.reset()
            self.runs += not self.streams
            stream = self.streams[name] = self._open(grid, key, halves, len(x) // halves)
            for one in self.streams.values() if len(self.streams) > 1 else ():
                self._note(one, APART)
        stream.step, stream.time = stream.step + 1, time
        return stream

    def _ordinal(self, time: float) -> str:
        """The name of a call without a context: the first at a timestep is the conditional half, the next the other."""
        # The loop of a bare transformer may break off and begin again at the same timestep: it has to say so.
        if (self.config.guidance if self.pipe is None else self.layout) != "separate":
            return "batch"
        called = [name for name, stream in self.streams.items() if stream.time == time]
        if len(called) == 2:
            self.reset()
        return "uncond" if len(called) == 1 else "cond"

    def _open(self, grid: Grid, key: tuple, halves: int, images: int) -> Stream:
        manager, scheduler, labels = copy.copy(self.manager), self.scheduler, None
        if self.stack.num_classes:
            labels = self._given["class_labels"]
            labels = labels[:images] if self.cond_first else labels[-images:]
        run = manager.open(
            self.stack,
            labels,
            torch.from_numpy(grid.timesteps),
            grid.alpha_bar(self.family, scheduler),
            cfg_scale=self._scale() if halves == 2 else 1.0,
            images=images,
            rewindable=scheduler is not None,
            model_id=self.config.model_id,
            sampler=sampler_of(scheduler),
        )
        stream = Stream(manager, run, grid, key)
        if isinstance(run, CorrectedRun) and run.rewinds:
            if (steps := self.linear_steps(grid)) is None:
                self._note(stream, f"steps of {type(scheduler).__name__} that are not known to be linear")
            else:
                stream.rewinding = Rewinding(run, steps, scheduler, halves, self.cond_first, self._scale() or 1.0)
        return stream
