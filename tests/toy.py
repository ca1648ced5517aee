"""Models small enough to check a cache by hand, and references that cache in the plainest way there is."""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import numpy as np
import torch

from adacorr import CacheManager, Policy, Predictor, Trace, make_policy
from adacorr.gates import fit_gate_basis
from adacorr.model_profile import KINDS
from adacorr.policies import calibrated
from adacorr.policy import Conditioning, RunInfo, Unit, View
from adacorr.profile import Profile, save_profile
from adacorr.transfer import on_device
from checkpoint import save_checkpoint
from diffusion import make_sampler
from models import DiT, DiTBlock
from pipeline import gaussian, sample_latents

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, num_heads=2, num_classes=5, learn_sigma=False)


def redraw(model, std, seed):
    """Every trained parameter anew, since adaLN-Zero starts with blocks that do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        # The output begins as the input, so that states stay near unit size: noise is mostly predicted right.
        embed, final = model.x_embedder.proj.weight, model.final_layer.linear.weight
        embed.mul_(0.3 / std)
        inverse = torch.linalg.pinv(embed.flatten(1)).unflatten(0, embed.shape[1:])  # (C, p, p, D)
        final.add_(inverse.permute(1, 2, 0, 3).flatten(0, 2))
        model.pos_embed.mul_(0.3)
        model.t_embedder.mlp[2].weight.mul_(0.2)  # features turn slowly along the trajectory,
        if model.num_classes:
            model.y_embedder.embedding_table.weight.mul_(2.0 / std * 0.2)  # and differ by label
    return model.eval().requires_grad_(False)


def tiny_dit(depth=3, seed=1, std=0.15, **options):
    """A DiT of 16 tokens, 32 wide, whose blocks all matter."""
    return redraw(DiT(**{**TINY, "depth": depth, **options}), std, seed)


def save_tiny(path, **options):
    """A checkpoint of 8 x 8 pixels and 4 classes, or of other `options` of a DiT."""
    model = tiny_dit(**{"depth": 2, "num_classes": 4, **options})
    save_checkpoint(path, model.state_dict(), model.config)
    return path


class Clock:
    """In the place of the module `time`: it stands still until it is told otherwise."""

    now = 1000.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


class TimedBlock(DiTBlock):
    """Branches sum_p coefficient_p (t / 1000)^p + bend * sin(t / 60) + label term, whatever the tokens."""

    def shape_branches(self, tokens, degree, bend, generator):
        width = self.attn.proj.out_features
        self.register_buffer("powers", torch.randn(2, degree + 1, tokens, width, generator=generator))
        self.register_buffer("by_label", torch.randn(2, tokens, width, generator=generator))
        self.register_buffer("wave", bend * torch.randn(2, tokens, width, generator=generator))
        return self

    def forward(self, x, c, tap=None):
        t, label = (c[:, i].view(-1, 1, 1) for i in range(2))
        branches = [
            sum(k * t**p for p, k in enumerate(powers)) + label * own + torch.sin(t * 1000 / 60) * wave
            for powers, own, wave in zip(self.powers, self.by_label, self.wave, strict=True)
        ]
        for gate, branch in zip(self.gates(c), branches, strict=True):
            x = x + gate.unsqueeze(1) * branch
        if tap is not None:
            tap(*branches)
        return x


class TimedDiT(DiT):
    """Conditioning that shows the timestep and the label in its first two channels."""

    def condition(self, t, y=None):
        c = super().condition(t, y)
        t = t.view(-1, 1).expand(len(c), 1) / 1000
        return torch.cat([t, y.view(-1, 1) / self.num_classes, c[:, 2:]], dim=1).to(c.dtype)


def timed_dit(degree, depth=2, seed=2, bend=0.0):
    """A DiT whose branches are polynomials in t plus a wave; its guidance difference never changes."""
    model = redraw(TimedDiT(**{**TINY, "depth": depth}), 0.1, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for block in model.blocks:
        block.__class__ = TimedBlock
        block.shape_branches(model.pos_embed.shape[1], degree, bend, generator)
    return model


def sample(model, steps=10, labels=(3, 0, 3), cfg_scale=1.5, cache=None, sampler="ddim", seed=0, first=0, **options):
    """Final states of images first, first + 1, ... of a seed, through the project's own loop."""
    indices = first + np.arange(len(labels))
    shape, device = (model.in_channels, model.input_size, model.input_size), model.pos_embed.device
    return sample_latents(
        model,
        make_sampler(sampler, steps),
        gaussian(seed, indices, shape).to(device),
        torch.tensor(labels, device=device) if model.num_classes else None,
        cfg_scale=cfg_scale,
        cache=cache,
        step_noise=lambda step, rows: on_device(gaussian(seed, indices[rows], shape, stream=step + 1), device),
        model_id="toy",
        **options,
    )


def fitted(name, model, folder, steps=10, cfg_scale=1.5, options=""):
    """A policy by name; one that needs a profile gets it from runs of this model, kept in `folder`."""
    if name in calibrated():
        path = folder / f"{name}-{steps}-{cfg_scale:g}.safetensors"
        if not path.exists():
            calibration = calibrated()[name].calibration()
            sample(model, steps, (0, 1, 2, 4), cfg_scale, CacheManager(calibration), seed=2**31)
            arrays, notes = calibration.fit()
            save_profile(path, Profile(name, arrays, "toy", "ddim", steps, cfg_scale, notes))
        options = ",".join(filter(None, [f"profile={path}", options]))
    return make_policy(f"{name}:{options}" if options else name)


def known_model(model, schedule, cfg_scale=1.5):
    """A profile for AdaCorrection with one schedule, a text of 2 (both halves), 1 and ".", and nearly exact gates.

    Its covariance is that of a smooth process, its mean nothing; its answers and factors are made up.
    """
    sampler = make_sampler("ddim", len(schedule))
    t, steps, width = sampler.timesteps, len(schedule), model.hidden_size
    reference = model.condition(t, torch.full(t.shape, model.null_label))
    basis = fit_gate_basis(model.blocks, reference, [reference[None]], 1e-5).basis
    kernel = np.exp(-(np.subtract.outer(t.numpy(), t.numpy()) ** 2) / (2 * 200.0**2)) + 1e-4 * np.eye(steps)
    arrays = {"timesteps": t.double().numpy(), "basis": basis.numpy(), "contrast": np.array(1.0)}
    arrays |= {"gate_weight": np.ones((2 * len(model.blocks), width)), "runs": np.array([steps])}
    arrays |= {f"timesteps_{steps}": t.double().numpy(), f"expected_{steps}": np.array([0.01])}
    arrays[f"schedules_{steps}"] = np.array([[".12".index(kind) for kind in schedule]], dtype=np.uint8)
    kinds, rng = KINDS[: 1 if cfg_scale == 1.0 else 2], np.random.default_rng(0)
    for kind in kinds:
        mean = np.zeros((steps, basis.shape[1] + 1, width))
        arrays |= {f"mean_{kind}": mean, f"covariance_{kind}": kernel, f"rest_{kind}": 1e-4 * kernel}
        arrays |= {f"unexplained_{kind}": np.full(steps, 0.01), f"readout_{kind}": np.ones(steps)}
    share = np.linspace(0.1, 0.9, model.input_size)  # the coarser, the less is answered
    arrays["response"] = np.broadcast_to(share[:, None, None] * np.eye(3), (steps, len(share), 3, 3))
    arrays["held"] = np.full((steps, len(share)), 0.3)
    arrays["answers"] = rng.uniform(size=(1 + 2 * len(kinds), steps, 2)).astype(np.float32)
    arrays["factor"] = rng.normal(size=(len(kinds), 2, steps, basis.shape[1] + 1, 4)).astype(np.float16)
    arrays["reading"] = rng.uniform(1, 2, size=steps)
    return Profile("adacorr", arrays, "toy", "ddim", steps, cfg_scale)


def rows_at(model, sampler, step, x, labels, halves):
    """What the model is called on at a step: [conditional; unconditional] rows."""
    t = sampler.timesteps[step].expand(halves * len(x))
    y = torch.cat([labels, torch.full_like(labels, model.null_label)])[: halves * len(x)]
    return torch.cat([x] * halves), t, y


def guided(out, cfg_scale):
    """The guided prediction (n, C, H, W) from rows [conditional; unconditional]; at scale 1 from conditional ones."""
    if cfg_scale == 1.0:
        return out
    cond, uncond = out.chunk(2)
    return uncond + cfg_scale * (cond - uncond)


def alphas(sampler):
    """Cumulative signal power of the linear schedule at a sampler's whole timesteps."""
    return np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))[sampler.timesteps.numpy()]


def open_run(model, manager, sampler, labels, cfg_scale=1.5, **options):
    """`manager.run` for the toy model."""
    options = {"model_id": "toy", "sampler": sampler.spec, **options}
    return manager.run(model, labels, sampler.timesteps, alphas(sampler), cfg_scale=cfg_scale, **options)


@torch.no_grad()
def show(model, manager, sampler, states, labels, cfg_scale=1.5):
    """The model's outputs (S, rows, C, H, W) through a cache that is shown the states (S, n, C, H, W) one by one."""
    outputs = []
    with open_run(model, manager, sampler, labels, cfg_scale) as run:
        for step, x in enumerate(states):
            run.begin_step(step)
            outputs.append(model(*rows_at(model, sampler, step, x, labels, 1 if cfg_scale == 1.0 else 2)))
    return torch.stack(outputs)


@torch.no_grad()
def forced(model, manager, steps=10, labels=(3, 0, 3), cfg_scale=1.5, seed=0):
    """(outputs, uncached outputs), each (steps, rows, C, H, W), both on the states of the uncached run."""
    sampler, labels = make_sampler("ddim", steps), torch.tensor(labels)
    x = gaussian(seed, np.arange(len(labels)), (model.in_channels, model.input_size, model.input_size))
    states, plain = [], []
    for step in range(steps):
        out = model(*rows_at(model, sampler, step, x, labels, 1 if cfg_scale == 1.0 else 2))
        states.append(x)
        plain.append(out)
        x = sampler.step(step, x, guided(out, cfg_scale))
    return show(model, manager, sampler, states, labels, cfg_scale), torch.stack(plain)


@dataclass
class Scheduled(Policy):
    """Compute each image at steps of its own."""

    steps: tuple = ((0,),)  # one tuple of steps for each image, or one for all
    stored: Predictor | None = None
    spans: tuple = ()
    name = "scheduled"

    @property
    def predictor(self):
        return self.stored

    def units(self, depth):
        return [Unit(*span) for span in self.spans] or [Unit(0, depth)]

    def decide(self, view):
        own = self.steps if len(self.steps) == view.images else self.steps * view.images
        return np.array([view.step in steps for steps in own])


# ---------------------------------------------------------------------------------------------- references


def forecast(steps, at, order):
    """Polynomial through the newest order + 1 of a list of (timestep, tensor), at a timestep."""
    used = steps[-(order + 1) :]
    times = np.array([t for t, _ in used]) / 1000.0
    # Lagrange weights by solving for them: powers 0, 1, ... of the timestep must come out right.
    powers = np.arange(len(used))
    weights = np.linalg.solve(times ** powers[:, None], (at / 1000.0) ** powers)
    return sum(float(w) * value.double() for w, (_, value) in zip(weights, used, strict=True)).float()


def through(blocks, x, c):
    """The blocks' output."""
    for block in blocks:
        x = block(x, c)
    return x


def run_all(blocks, x, c):
    """Every block, (its output, pre-gate outputs (branches, N, T, D))."""
    branches = []
    for block in blocks:
        x = block(x, c, lambda attn, mlp: branches.extend((attn, mlp)))
    return x, torch.stack(branches)


def apply_gates(blocks, x, c, branches):
    """Given pre-gate outputs under the gates of now: block by block, as in the paper."""
    for i, block in enumerate(blocks):
        _, _, gate_attn, _, _, gate_mlp = block.modulation(c)
        x = x + gate_attn.unsqueeze(1) * branches[2 * i]
        x = x + gate_mlp.unsqueeze(1) * branches[2 * i + 1]
    return x


@contextmanager
def standing_in(model, stack):
    """The model with stack(step, blocks, x, c) in the place of its blocks."""
    steps = count()
    model.cache = SimpleNamespace(run_blocks=lambda blocks, x, c: stack(next(steps), blocks, x, c))
    try:
        yield
    finally:
        model.cache = None


def sample_with(stack, model, **arguments):
    """`sample` with stack(step, blocks, x, c) in the place of the model's blocks."""
    with standing_in(model, stack):
        return sample(model, **arguments)


class Twin:
    """Computes all rows at `steps`, else does what `kind` says.

    branches   every pre-gate output forecast, fresh gates: order 0 is FORA, order 2 what TaylorSeer means
    residual   the stack's residual of the last computed step
    """

    def __init__(self, kind, steps, timesteps, order=0):
        self.kind, self.steps, self.timesteps, self.order = kind, steps, timesteps.tolist(), order
        self.computed = []

    def __call__(self, step, blocks, x, c):
        t = self.timesteps[step]
        if step in self.steps:
            out, branches = run_all(blocks, x, c)
            self.computed.append((t, branches if self.kind == "branches" else out - x))
            return out
        if self.kind == "branches":
            return apply_gates(blocks, x, c, forecast(self.computed, t, self.order))
        return x + self.computed[-1][1]


class HeldBranches:
    """Runs a branch (0 attention, 1 MLP) of a block where runs(step, layer, branch) says so, else holds its output.

    What is held is from before the gate, which is fresh, or with `frozen` from after it.
    """

    def __init__(self, runs, frozen=False):
        self.runs, self.frozen, self.held = runs, frozen, {}

    def __call__(self, step, blocks, x, c):
        for layer, block in enumerate(blocks):
            six = block.modulation(c)
            for i, branch in enumerate((block.attn_branch, block.mlp_branch)):
                shift, scale, gate = six[3 * i : 3 * i + 3]
                then, now = (gate.unsqueeze(1), 1) if self.frozen else (1, gate.unsqueeze(1))
                if self.runs(step, layer, i):
                    self.held[layer, i] = then * branch(x, shift, scale)
                x = x + now * self.held[layer, i]
        return x


def derivatives(fresh, old, step, last):
    """The releases' difference quotients: of a value at `step`, its first one to the value at `last`, and so on.

    old: those of the step `last`, as many as are to be made from.
    """
    made = [fresh]
    for before in old:
        made.append((made[-1] - before) / (step - last))
    return made


# ---------------------------------------------------------------------------------------- policies by themselves


def make_run(model, images=1, halves=1, steps=10, **fields):
    """A `RunInfo` as a cache manager would make it."""
    timesteps = make_sampler("ddim", steps).timesteps.double().numpy()
    tokens, width = model.pos_embed.shape[1:]
    flops = model.branch_flops()
    return RunInfo(images, halves, timesteps, model.blocks, tokens, width, model.pos_embed.device, flops, **fields)


def make_view(run, step, x, unit=None, x_in=None, age=None, c=None):
    """A `View` of x (halves, n, T, D); conditioning c (halves * n, D) is zero unless given."""
    unit = unit or Unit(0, run.depth)
    c = torch.zeros(x.shape[0] * x.shape[1], run.width) if c is None else c
    age = np.full(x.shape[1], 1) if age is None else np.asarray(age)
    trace = Trace(run.num_steps, run.depth, run.images, run.visible_halves, (400, 600))
    return View(run, step, unit, x, x if x_in is None else x_in, age, Conditioning(run.blocks, c), trace)
