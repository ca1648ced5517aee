"""The cache on one transformer: hooks on it and on its blocks, and the runs behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from adacorr import compiled
from adacorr.correct import AdaCorrection
from adacorr.integrations.diffusers.blocks import argument_names
from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.families import KEYWORDS, Family
from adacorr.integrations.diffusers.halves import Arguments, Call, Halves, Uncached, alike
from adacorr.integrations.diffusers.rewinding import Rewinding
from adacorr.integrations.diffusers.rows import Rows
from adacorr.integrations.diffusers.schedule import Grid, sampler_of, time_of
from adacorr.integrations.diffusers.stack import Stack
from adacorr.linear_steps import LinearSteps, linear_steps, scheduler_step
from adacorr.run import CachedRun
from adacorr.transfer import on_device

HOOK = "adacorr"


class BlockHook(ModelHook):
    """Stands in for a block's forward: the first block runs the whole stack, the others pass its result on."""

    def __init__(self, attachment: Attachment, first: bool):
        super().__init__()
        self.attachment, self.first = attachment, first
        self.compiled: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.attachment.enter(self, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward without this hook."""
        return (self.compiled or self.fn_ref.original_forward)(*args, **kwargs)


@dataclass
class Sampling:
    """One sampling run, up to its newest step, whose call was given `state`."""

    run: CachedRun
    grid: Grid
    key: tuple
    rewinding: Rewinding | None = None
    step: int = -1
    time: float = float("inf")
    state: Tensor | None = None


class Attachment:
    """One transformer under a cache, from `install` to `remove`.

    arguments    of the pipeline's call that is under way, or None
    not_rewound  why runs go on without rewinding, and how many
    observe      what looks at each step of a run: (run, rows that it began with, output)
    """

    def __init__(self, transformer: nn.Module, family: Family, config: CacheConfig, pipe: Any, component: str):
        self.transformer, self.family, self.config = transformer, family, config
        self.pipe, self.component = pipe, component
        self.manager = config.manager()
        self.layout = config.guidance or family.layout
        self.cond_first = self.layout != "uncond_first"
        self.arguments: Arguments | None = None
        self.stack: Stack | None = None
        self.sampling: Sampling | None = None
        self.halves = Halves()
        self.runs = 0
        self.bypassed: Counter[str] = Counter()
        self.not_rewound: Counter[str] = Counter()
        self.observe: Callable[[Sampling, Tensor, Tensor], None] | None = None
        self._call: Call | None = None  # that is under way, where the cache takes it
        self._undo = ExitStack()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a cache is attached: disable() its handle before the model is copied or pickled")

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
            undo.enter_context(self.transformer.register_forward_hook(self._after))
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take the hooks off; the modules are as they were found."""
        self._undo.close()
        for module in self.transformer.modules():
            if hasattr(module, "_diffusers_hook"):  # it remembers those of its children, of which some are gone
                module._diffusers_hook._child_registries_cache = None
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

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments] | None:
        """The transformer is called: see whether the cache takes the call. The arguments to call it with, if others."""
        if self._call is not None:  # the call before broke off
            self.reset()
        names = argument_names(type(module))
        given = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
        try:
            self._call = self._taken(given)
        except Uncached as why:
            self.bypassed[str(why)] += 1
            self._note(str(why))  # guidance by a further call
        if self._call is None or self._call.given is given:
            return None
        return (), _known(self._call.given)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, out: Any) -> Any:
        """The call is over: past steps are taken again, if it is time. What it gives, if that is not `out`."""
        if (call := self._call) is None:
            return None
        if (sampling := call.sampling) is not None:
            rows = call.given["hidden_states"]
            with torch.no_grad():
                if sampling.rewinding is not None:
                    self._note(sampling.rewinding.correct(rows, out[0], self.replay))
                if self.observe is not None:
                    self.observe(sampling, rows, out[0])
        self._call = None
        gives = call.known
        if call.half is not None:
            halves = out[0].detach().chunk(2)
            gives = halves[call.half]
            if call.half == 0:
                self.halves.kept = halves[1]
            elif sampling.rewinding is not None:
                sampling.rewinding.expected = None  # of the first half, the pipeline has what it got before
        return None if gives is None else (gives,) if isinstance(out, tuple) else type(out)(gives)

    def _note(self, why: str) -> None:
        """A run that rewinds goes on without it if there is a reason."""
        now = self.sampling
        if why and now is not None and now.rewinding is not None:
            self.not_rewound[why] += 1
            now.rewinding = now.run.rewinds = None

    def replay(self, step: int, rows: Tensor, images: np.ndarray) -> Tensor:
        """The transformer's output for other rows at a step up to this one, of which those of `images` count."""
        call, rewinding = self._call, self._call.sampling.rewinding
        call.replayed = rewinding.rows_of(images)
        try:
            return self._forward(call.given, hidden_states=rows, timestep=rewinding.timesteps[step])
        finally:
            call.replayed = None

    def uncached(self, rows: Tensor) -> Tensor:
        """The transformer's output for other rows at this step; all blocks run."""
        call, self._call = self._call, None
        try:
            return self._forward(call.given, hidden_states=rows)
        finally:
            self._call = call

    def _forward(self, given: Arguments, **others: Any) -> Tensor:
        """The output for the arguments of a call, with others in their place."""
        return self.transformer.forward(**_known(given) | others | {"return_dict": False})[0]

    @torch.compiler.disable
    def enter(self, hook: BlockHook, args: tuple, kwargs: Arguments) -> Any:
        """The block of a hook is called."""
        if self._call is None:
            return hook.forward(*args, **kwargs)
        if hook.first:
            with torch.no_grad():
                self._call.result = self._run(self._call, args, kwargs)
        return self._call.result

    # ------------------------------------------------------------------ calls

    def _taken(self, given: Arguments) -> Call | None:
        """The call to make in place of one with these arguments; None if it is to run as it is for now.

        Uncached for one that is no step of a run.
        """
        for name in self.family.bypass:
            if given.get(name) is not None:
                raise Uncached(name)
        for name in KEYWORDS:
            if any(not isinstance(value, (int, float, str)) for value in (given.get(name) or {}).values()):
                raise Uncached(name)
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise RuntimeError("context or tensor parallelism was enabled under the cache: disable() it first")
        if self.pipe is not None and self.arguments is None:
            name = type(self.pipe).__name__
            raise RuntimeError(
                f"the cache of {name} is on a transformer that is called from elsewhere: enable the pipeline that "
                "calls it, or the transformer itself"
            )
        time, newest = time_of(given["timestep"], self.family), self.sampling
        follows = newest is not None and newest.grid.follows(newest.step, newest.time, time, self.pipe is None)
        call, apart = Call(given, time, follows), self.layout == "separate" and (self._scale() or 0.0) > 1.0
        if apart and (second := self.halves.second(call)) is not None:
            return second
        if self.pipe is not None and newest is not None and newest.time == time:
            state = given["hidden_states"]
            if alike(state, newest.state[: len(state)]):
                raise Uncached("a further call at a timestep")
        if not follows and self._grid(time) is None:
            raise Uncached("a timestep that is none of the scheduler's")
        return self.halves.begin(call) if apart else call

    def _scale(self) -> float | None:
        """Of guidance: as it was given, or that of the pipeline's call."""
        # A transformer that is told the scale was distilled to it: two halves are guided by another one.
        distilled = "guidance" in argument_names(type(self.transformer))
        names = ("true_cfg_scale",) if distilled else ("guidance_scale",)
        if self.component == "transformer_2":
            names = ("guidance_scale_2", *names)
        found = (self.config.guidance_scale, *map((self.arguments or {}).get, names))
        return next((scale for scale in found if scale is not None), None)

    # ------------------------------------------------------------------ runs

    def begin_call(self, arguments: Arguments) -> None:
        """The pipeline is called. RuntimeError where it has another transformer by now."""
        if all(module is not self.transformer for module in getattr(self.pipe, self.component).modules()):
            raise RuntimeError(f"the pipeline has another {self.component} than its cache is on: enable it anew")
        self.reset()
        self.arguments = arguments

    def end_call(self) -> None:
        """The pipeline's call is over."""
        self.reset()
        self.arguments = None

    def reset(self) -> None:
        """Forget the run under way; its statistics stay."""
        if self.sampling is not None:
            self.sampling.run.close()
            self.manager.bytes, self.sampling = self.sampling.run.bytes, None
        self.halves, self._call = Halves(), None

    def _run(self, call: Call, args: tuple, kwargs: Arguments) -> Any:
        """The whole stack for the first block's call -> what its last block would give."""
        full = {**dict(enumerate(args)), **kwargs}
        x, start = full[0 if 0 in full else "hidden_states"], 0
        if self.family.joint:
            text = full[1 if 1 in full else "encoder_hidden_states"]
            x, start = torch.cat([text, x], dim=1), text.shape[1]
        if call.replayed is not None:
            x = self._add_replayed(call, x)
        elif call.known is None:
            x = self._step(call, x, full, start)
        if not self.family.joint:
            return x
        text, image = x[:, :start], x[:, start:]
        return (image, text) if self.family.returns == "image, text" else (text, image)

    def _step(self, call: Call, x: Tensor, full: dict[Any, Any], text: int) -> Tensor:
        """The stack for tokens x (rows, T, D), of which `text` are of text, at the step that the call belongs to."""
        c = Rows.of(full, self.stack.blocks[0].keys(self.family.by_row), len(x), text)
        self.stack.describe(x, c, call.given)
        halves, order = self._halves(call, len(x)), None
        if halves == 2 and not self.cond_first:  # the core wants the conditional half first
            order = torch.arange(len(x), device=x.device).roll(len(x) // 2)
            x, c = x[order], c[order]
        now = call.sampling = self._sampling(call, x, c, halves)
        if now.rewinding is not None:
            self._note(now.rewinding.begin(now.state, call.given["timestep"]))
        now.run.begin_step(now.step)
        x = now.run.run_blocks(self.stack.blocks, x, c)
        return x if order is None else x[order]  # a swap of halves undoes itself

    def _add_replayed(self, call: Call, x: Tensor) -> Tensor:
        """The stack where a step is taken again: what is known that it adds, in the rows that it is known of."""
        rows = on_device(call.replayed, x.device)
        return x.index_copy(0, rows, call.sampling.run.run_blocks(self.stack.blocks, x[rows], None))

    @property
    def scheduler(self) -> Any:
        """The pipeline's, or None."""
        return None if self.pipe is None else self.pipe.scheduler

    def linear_steps(self, grid: Grid, *, remembers: bool = True) -> LinearSteps | None:
        """Those of the pipeline's scheduler on a grid, as `adacorr.linear_steps` finds them."""
        advance = getattr(self.pipe, "advance", scheduler_step)
        return linear_steps(self.scheduler, self.scheduler.timesteps[grid.where], advance, remembers=remembers)

    def _halves(self, call: Call, rows: int) -> int:
        """2 where the call's rows are both guidance halves of each image; looked at once in a run."""
        if call.half is not None:
            return 2
        scale = self._scale()
        if self.layout == "separate" or scale is None or scale <= 1.0 or rows % 2:
            return 1
        trace = self.manager.trace
        if call.follows and rows == trace.halves * trace.images:
            return trace.halves
        return 2 if self._is_doubled(call.given) else 1

    def _is_doubled(self, given: Arguments) -> bool:
        """Whether both halves of the batch are the same images, and one of them has the null label, where there is one.

        Other kinds of guidance stack other things.
        """
        if not torch.equal(*given["hidden_states"].chunk(2)):
            return False
        if not self.stack.num_classes:
            return True
        first, second = given["class_labels"].chunk(2)
        null = second if self.cond_first else first
        return bool((null == self.stack.num_classes).all())

    def _grid(self, time: float) -> Grid | None:
        return Grid.of(time, self.family, self.config, self.pipe, self.component)

    def _sampling(self, call: Call, x: Tensor, c: Rows, halves: int) -> Sampling:
        """The run that the call belongs to, at its step; a new one where the call does not follow on."""
        key = (x.shape, x.dtype, x.device, c.text, halves, self._scale())
        if not call.follows or self.sampling.key != key:
            self.sampling = self._open(call, key, halves, len(x) // halves)
            self.runs += 1
        now = self.sampling
        now.step, now.time, now.state = now.step + 1, call.time, call.given["hidden_states"]
        return now

    def _open(self, call: Call, key: tuple, halves: int, images: int) -> Sampling:
        grid, scheduler, labels = self._grid(call.time), self.scheduler, None
        if self.stack.num_classes:
            labels = call.given["class_labels"]
            labels = labels[:images] if self.cond_first else labels[-images:]
        correction = self.manager.correction
        rewinds = scheduler is not None and isinstance(correction, AdaCorrection) and correction.rewind
        steps = self.linear_steps(grid) if rewinds else None
        self.sampling = None  # its tensors make room
        run = self.manager.open(
            self.stack,
            labels,
            torch.from_numpy(grid.timesteps),
            grid.alpha_bar(self.family, scheduler),
            cfg_scale=self._scale() if halves == 2 else 1.0,
            images=images,
            rewindable=scheduler is not None,
            model_id=self.config.model_id,
            sampler=sampler_of(scheduler),
            spent=0.5 if call.half == 1 else 0.0,  # the conditional half was called before
            steps=steps,
        )
        sampling = Sampling(run, grid, key)
        if rewinds:
            if steps is None:
                why = f"steps of {type(scheduler).__name__} that are not known to be linear"
                self.not_rewound[why] += 1
                run.rewinds = None
            else:
                sampling.rewinding = Rewinding(run, steps, scheduler, self.cond_first)
        return sampling


def _known(given: Arguments) -> Arguments:
    """Without arguments that were not given."""
    return {name: value for name, value in given.items() if value is not None}
