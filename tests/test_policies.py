"""The policies: the contract that every one of them keeps, their options, and how a new one is added."""

import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import column, walk
from torch.testing import assert_close
from toy import (
    TINY,
    HeldBranches,
    Scheduled,
    alphas,
    fitted,
    forced,
    open_run,
    rows_at,
    sample,
    sample_with,
    save_tiny,
    show,
    tiny_dit,
)  # fmt: skip

import adacorr
import sample as script
from adacorr import AdaCorrection, CacheManager, Predictor, Unit, by_branch, make_policy
from adacorr.__main__ import main
from adacorr.policies import calibrated, policies, register
from diffusion import make_sampler
from models import DiT

HELD = Predictor("residual", 0)
ROOT = Path(__file__).resolve().parents[1]
NAMES = list(policies())  # a new file in the folder comes under the contract by itself
# Settings that skip on a model whose features turn as fast as the toy's; the other methods skip by default.
SKIPPING = {
    "adacache": "scale=10", "dicache": "threshold=2", "easycache": "threshold=1.375,warmup=1",
    "ertacache": "threshold=1", "fastcache": "threshold=1", "first_block": "threshold=1", "lazydit": "threshold=1",
    "h2_cache": "threshold=1,detail=1", "precisecache": "threshold=1", "rfc": "threshold=0.7",
    "sencache": "threshold=1,start=1", "speca": "base_threshold=30,order=1,max_taylor=20", "teacache": "threshold=0.7",
}  # fmt: skip
# Those that skip at steps of their own.
BY_IMAGE = {"adacache", "dicache", "easycache", "first_block", "lazydit", "rfc", "speca", "teacache"}
# More settings that the contract is asked of: name, options.
VARIANTS = [
    ("adacache", "scale=10,gates=frozen"),
    ("dicache", "error=difference,retention=0.2,threshold=inf"),
    ("fastcache", "threshold=inf,form=residual"),
    ("first_block", "threshold=inf"),
    ("first_block", "threshold=0.5,front=2"),
    ("first_block", "threshold=0.5,back=1,order=1"),
    ("interval", "every=4,order=2,align=start"),
    ("rfc", "order=2,weights=exact,norm=token,threshold=0.5"),
    ("schedule", "order=0,affine=true"),
    ("taylorseer", "every=2,order=2,weights=exact"),
]
CASES = [*((name, SKIPPING.get(name, "")) for name in NAMES), *VARIANTS]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=[":".join(filter(None, case)) for case in CASES])


def computed(manager, half=0):
    return [manager.trace.computed_steps(i, half) for i in range(manager.trace.images)]


def run(model, spec, **arguments):
    """(manager, final states) of a policy by its spec."""
    manager = CacheManager(make_policy(spec) if isinstance(spec, str) else spec)
    return manager, sample(model, cache=manager, **arguments)


# ------------------------------------------------------------------------------------------------ contract


def keeps_the_contract(make, model, device="cpu"):
    """What must hold for any policy, whatever it decides; make(model, steps=, cfg_scale=) gives the policy."""
    model = model.to(device)
    for cfg_scale in (1.0, 1.5):
        policy = make(model, cfg_scale=cfg_scale)
        before = repr(policy), dict(vars(policy))
        for correction in (None, AdaCorrection()):
            manager = CacheManager(policy, correction)
            first = sample(model, cfg_scale=cfg_scale, cache=manager)
            assert (first.shape, first.dtype, first.device.type) == ((3, 3, 8, 8), torch.float32, device)
            assert bool(torch.isfinite(first).all())
            assert model.cache is None
            assert (repr(policy), vars(policy)) == before  # a run works on a copy
            halves = 1 if cfg_scale == 1.0 else 2
            trace = manager.trace
            assert trace.executed.shape == (10, 3, 2, 3, halves)
            assert trace.score.shape == trace.weight.shape == (10, 3, 3)
            assert trace.done == 10
            assert (trace.executed[0] == 1).all()  # nothing to reuse in the first step
            assert ((trace.executed >= 0) & (trace.executed <= 1)).all()
            assert 0 <= trace.hit_rate < 1
            json.dumps(trace.summary(), allow_nan=False)
            # Later runs of the same manager do not see the earlier ones, of whatever batch.
            sample(model, labels=(1,), cfg_scale=cfg_scale, cache=manager, seed=1)
            assert torch.equal(sample(model, cfg_scale=cfg_scale, cache=manager), first)
        if device == "cpu":
            cached, plain = forced(model, CacheManager(policy), cfg_scale=cfg_scale)
            assert torch.equal(cached[0], plain[0])
    leaves_its_input_alone(make(model, steps=4, cfg_scale=1.0), model)


@torch.no_grad()
def leaves_its_input_alone(policy, model):
    sampler, device = make_sampler("ddim", 4), model.pos_embed.device
    labels = torch.tensor([1, 2], device=device)
    generator = torch.Generator().manual_seed(3)
    identity = {"model_id": "toy", "sampler": "ddim"}
    with CacheManager(policy).run(model, labels, sampler.timesteps, alphas(sampler), **identity) as opened:
        for step in range(4):
            opened.begin_step(step)
            x = torch.randn(2, 16, 32, generator=generator).to(device)
            c = model.condition(sampler.timesteps[step].to(device).expand(2), labels)
            kept = x.clone(), c.clone()
            out = opened.run_blocks(model.blocks, x, c)
            assert torch.equal(x, kept[0])
            assert torch.equal(c, kept[1])
            assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@cases
def test_contract(name, options, device, folder):
    keeps_the_contract(lambda model, **run: fitted(name, model, folder, **run, options=options), tiny_dit(), device)


@cases
def test_a_half_precision_model_runs_and_stays_finite(name, options, folder):
    policy = fitted(name, tiny_dit(), folder, options=options)
    model = tiny_dit().to(torch.bfloat16)
    for correction in (None, AdaCorrection()):
        out = sample(model, cache=CacheManager(policy, correction))
        assert out.dtype == torch.float32
        assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("corrected", [False, True], ids=["alone", "corrected"])
@cases
def test_an_image_is_the_same_alone_and_in_any_batch(name, options, corrected, folder, model):
    policy = fitted(name, model, folder, steps=20, options=options)
    manager = CacheManager(policy, AdaCorrection(gamma=0.3) if corrected else None)
    labels = (3, 0, 1, 4)
    together = sample(model, 20, labels, cache=manager)
    ran = manager.trace.executed
    assert (ran < 1).any() or name == "never"
    if not corrected and options == SKIPPING.get(name) and name in BY_IMAGE:
        assert (ran != ran[:, :, :, :1]).any()
    for image in (0, 3):
        alone = sample(model, 20, labels[image : image + 1], cache=manager, first=image)
        assert np.array_equal(ran[:, :, :, image], manager.trace.executed[:, :, :, 0])
        assert_close(together[image], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(calibrated()))
def test_profiles_are_refused_elsewhere(name, folder, model):
    policy = fitted(name, model, folder)
    with pytest.raises(ValueError, match=f"{name}: profile=.*does not fit this run.*steps 10 there, 12 here"):
        sample(model, 12, cache=CacheManager(policy))
    with pytest.raises(ValueError, match="guidance 1.5 there, 4.0 here"):
        sample(model, cfg_scale=4.0, cache=CacheManager(policy))
    with pytest.raises(ValueError, match="sampler ddim there, ddpm here"):
        sample(model, sampler="ddpm", cache=CacheManager(policy))
    with pytest.raises(ValueError, match=f"{name} has no profile for this run.*python calibrate.py"):
        sample(model, cache=CacheManager(make_policy(name)))  # the shipped ones are for another model
    assert model.cache is None


NO_REUSE = {
    "adacache": "scale=0", "block_cache": "threshold=0", "clusca": "every=1", "delta_dit": "every=1",
    "dicache": "threshold=0", "duca": "every=1,ratio=0", "easycache": "threshold=0", "ertacache": "threshold=0",
    "fastercache": "every=1,attention=1", "feb_cache": "table=f", "first_block": "threshold=0", "freqca": "every=1",
    "h2_cache": "threshold=0,detail=0", "hicache": "every=1", "icc": "every=1", "interval": "every=1", "l2c": "l1=0",
    "lazydit": "threshold=0", "magcache": "threshold=0", "never": "", "pab": "every=1",
    "precisecache": "threshold=0,block=0", "procache": "budget=10", "rfc": "threshold=0", "schedule": "share=1",
    "sencache": "threshold=0,start=0", "smoothcache": "threshold=0", "taylorseer": "every=1", "teacache": "threshold=0",
    "toca": "every=1,ratio=0",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_REUSE)
def test_no_reuse_is_the_plain_model_to_the_bit(name, folder, model):
    manager = CacheManager(fitted(name, model, folder, options=NO_REUSE[name]))
    assert torch.equal(sample(model, cache=manager), sample(model))
    assert manager.trace.hit_rate == 0


# Methods whose steps go on from what was computed last: branch outputs under fresh gates, or what blocks added.
FRESH = ["feb_cache:table=ffmsfmmssf", "l2c", "lazydit:threshold=1", "pab", "procache:ratio=0", "smoothcache"]
FRESH += ["smoothcache:lags=last", "toca:ratio=0"]
FROZEN = ["adacache:scale=10,gates=frozen", "block_cache", "delta_dit:every=3", "easycache:threshold=1,warmup=1"]
FROZEN += ["ertacache:threshold=1,rectify=none", "first_block:threshold=1", "first_block:threshold=1,front=1,back=1"]
FROZEN += ["h2_cache:threshold=1,detail=1", "magcache:retention=0", "precisecache:threshold=1", "teacache:threshold=1"]
FROZEN += ["sencache:threshold=1,start=1"]


@pytest.mark.parametrize(("spec", "frozen"), [*((s, False) for s in FRESH), *((s, True) for s in FROZEN)])
def test_what_does_not_run_is_held(spec, frozen, folder, model):
    name, _, options = spec.partition(":")
    manager = CacheManager(fitted(name, model, folder, options=options))
    out = sample(model, labels=(1,), cache=manager)
    ran = manager.trace.executed[..., 0, 0] == 1  # (steps, layers, branches)
    assert 0 < ran.mean() < 1
    twin = HeldBranches(lambda *place: ran[place], frozen)
    assert_close(out, sample_with(twin, model, labels=(1,)), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- rules that measure a change


# Leading steps that are always computed.
measuring = pytest.mark.parametrize(
    ("spec", "lead"),
    [("dicache:retention=0", 1), ("first_block:back=0", 1), ("rfc:order=1", 2), ("teacache:profile=none", 1)],
)


@measuring
def test_thresholds_0_and_infinity(spec, lead):
    assert column(walk(f"{spec},threshold=0", [[1.0]] * 4)) == "xxxx"
    assert column(walk(f"{spec},threshold=inf", [[1.0], [9.0], [-9.0], [20.0]])) == "xxxx"[:lead] + "...."[lead:]


@pytest.mark.parametrize("halves", [1, 2])
@measuring
def test_scope_is_the_image_with_its_halves_or_the_batch(spec, lead, halves):
    # Image 0 moves in its last half only, image 1 does not move. RFC's errors are relative to the input of now.
    still, now = torch.ones(halves, 2, 1, 2), torch.ones(halves, 2, 1, 2)
    now[-1, 0] = 1.4
    image, batch = 0.4 / halves, 0.2 / halves
    if spec.startswith("rfc"):
        image, batch = image / (1 + image), batch / (1 + batch)
    for threshold in (batch * 0.9, (batch + image) / 2, image * 1.1):
        states = [still] * lead + [now]
        assert walk(f"{spec},threshold={threshold}", states)[-1] == [threshold < image, False]
        assert walk(f"{spec},threshold={threshold},scope=batch", states)[-1] == [threshold < batch] * 2


RFC_INPUTS = [1.0, 1.1, 1.25, 1.4, 1.55, 1.6, 1.6]  # see test_policy_rfc.py


@pytest.mark.parametrize(
    ("spec", "one", "other", "decided"),
    [
        # Changes of 0.1, 0.1, 0, 0, each to the step before, and of 0, 0.1, 0.1, 0.
        ("dicache:threshold=0.15,retention=0", [1, 1.1, 1.21, 1.21, 1.21], [1, 1, 1.1, 1.21, 1.21], "x.x.. x..x."),
        ("teacache:threshold=0.15,profile=none", [1, 1.1, 1.21, 1.21, 1.21], [1, 1, 1.1, 1.21, 1.21], "x.x.. x..x."),
        # 0.3 to 1, 0 and 0.08 to 1.3; 0.1 and 0.2 to 1, 0.04 to 1.2.
        ("first_block:threshold=0.12", [1, 1.3, 1.3, 1.4], [1, 1.1, 1.2, 1.25], "xx.. x.x."),
        # The other image is forecast as 1 (it is 2), 2.5 (2), 2 (3), and 4 at the end, as it is.
        ("rfc:threshold=0.1", RFC_INPUTS, [1, 1, 1, 2, 2, 3, 4], "xx.x..x xx.xxx."),
    ],
    ids=["dicache", "teacache", "first_block", "rfc"],
)
def test_images_are_measured_by_themselves(spec, one, other, decided):
    together = walk(spec, [list(pair) for pair in zip(one, other, strict=True)])
    assert f"{column(together, 0)} {column(together, 1)}" == decided
    for own, expected in zip((one, other), decided.split(), strict=True):
        assert column(walk(spec, [[x] for x in own])) == expected


@pytest.mark.parametrize(
    ("spec", "states", "granted", "decided"),
    [
        ("dicache:threshold=0.1,retention=0", [1.0, 1.2, 1.2, 1.2], 1, "xxxx"),
        ("easycache:threshold=0.2,warmup=1", [2.0, 1.0, 1.3, 1.3, 1.3], 2, "xxxxx"),
        ("first_block:threshold=0.5", [1.0, 2.0, 2.0], 1, "xxx"),
        ("rfc:threshold=0.1", RFC_INPUTS, 2, "xx.xxxx"),
    ],
    ids=["dicache", "easycache", "first_block", "rfc"],
)
def test_a_wish_that_is_not_granted_stays(spec, states, granted, decided):
    assert column(walk(spec, [[x] for x in states], granted=granted)) == decided


# ------------------------------------------------------------------------------------------------- options

# Values just outside of the ranges, and text for a number.
REFUSED = {
    "adacache": "scale=-0.1 scale=nan gates=old scope=row codebook=quick codebook=0.2:3/0.1:2 codebook=0.1:2/0.2:3 "
    "codebook=0:2 codebook=0.1:0 codebook=0.1 codebook=inf:2 codebook=0.1:2/ codebook=0.1:2.5 codebook=nan:2 "
    "codebook=0.1:3/inf:2",
    "block_cache": "threshold=-0.1 threshold=nan profile=/nowhere/at/all.json",
    "delta_dit": "every=0 share=1.1 share=-0.1 switch=nan switch=2",
    "dicache": "threshold=-0.1 threshold=nan scope=row error=input depth=0 retention=1.01 retention=-0.01 g_max=0.99",
    "easycache": "threshold=-1 threshold=nan warmup=0 scope=row",
    "ertacache": "threshold=-0.1 threshold=nan rectify=some profile=none",
    "fastcache": "threshold=-0.1 threshold=nan scope=row tau=-1 tau=nan form=linear",
    "fastercache": "every=0 attention=0 weight=1.1 alpha=-1 uncond_below=-1 below=nan",
    "feb_cache": "table=fox every=-1 noisy=1.1 between=f delta=0",
    "first_block": "threshold=-0.1 threshold=nan scope=pair front=0 back=-1 warmup=-1 max_continuous=-2 order=5 "
    "max_cached=-2 order=-1",
    "freqca": "every=0 order=5 order=-1 sigma=0.0 sigma=1.1 cutoff=-0.1 cutoff=1.1 first_enhance=0",
    "h2_cache": "scope=row threshold=-1 detail=nan split=1.1 pool=0 detail_pool=0",
    "hicache": "every=0 order=5 order=-1 sigma=0.0 sigma=1.1 first_enhance=0 gate_error=-0.1 gate_error=0.6",
    "icc": "every=0 rank=0.0 rank=1.1",
    "interval": "every=0 every=2.5 warmup=-1 order=5 order=-1 align=middle",
    "l2c": "threshold=1.1 threshold=-0.1 threshold=nan l1=-1 l1=nan",
    "lazydit": "threshold=-0.1 threshold=nan scope=row attn_threshold=-1 mlp_threshold=-1 max_lag=0 profile=none",
    "magcache": "threshold=-0.1 threshold=nan max_skip=-1 retention=1.5 profile=none",
    "pab": "every=0 low=-1 high=nan high=100",
    "precisecache": "scope=row threshold=nan block=-0.1 cell=0 cutoff=1.1",
    "rfc": "threshold=-0.1 threshold=nan scope=row order=0 order=3 weights=lagrange norm=tensor rfe=1",
    "schedule": "share=0.0 share=1.1 first=0 order=3 power=0.4 power=33 profile=none",
    "sencache": "threshold=-1 start=nan share=1.1 max_skip=-1 scope=row profile=none",
    "smoothcache": "threshold=-0.1 threshold=nan max_lag=0 profile=none lags=one",
    "speca": "base_threshold=-1 decay_rate=0 min_taylor=0 max_taylor=0 scope=row",
    "taylorseer": "gate_error=-0.1 gate_error=0.6 every=0 order=5 order=-1 first_enhance=0 weights=lagrange",
    "teacache": "threshold=-0.1 threshold=low scope=row profile=/nowhere/at/all.json",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_option_is_refused_and_named(name):
    for item in REFUSED[name].split():
        key, _, value = item.partition("=")
        shown = re.escape(value).replace("none", "None")
        with pytest.raises(ValueError, match=rf"^{name}: {key}='?{shown}(\.0)?'? (must|does not exist|is unknown)"):
            make_policy(f"{name}:{item}")


def test_an_unknown_name_or_key_is_told_with_the_way_out():
    with pytest.raises(ValueError, match="'teacach' is unknown; choose one of .*did you mean teacache") as caught:
        make_policy("teacach:threshold=0.2")
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ValueError, match="no option 'evry'.*did you mean every"):
        make_policy("interval:evry=3")
    with pytest.raises(ValueError, match="profile=none must come with form=increment"):
        make_policy("fastcache:profile=none,form=residual")


# ------------------------------------------------------------------------------------------------ registry


def test_a_name_can_be_taken_once_and_by_a_dataclass(registry):
    with pytest.raises(ValueError, match="'interval' is registered already"):
        register(policies()["interval"])

    class Plain(adacorr.Policy):
        """No dataclass."""

    with pytest.raises(ValueError, match="must be a dataclass"):
        register(Plain)


def on_the_page(page):
    """The policy that a page of the documentation shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return next(block for block in blocks if "@register" in block)


def test_a_new_policy_is_one_short_file_and_no_other_edit(registry, monkeypatch, tmp_path, capsys):
    name, options, text = "from_the_page", "every=4", on_the_page("docs/policies.md")
    assert len(text.splitlines()) < 80
    with pytest.raises(ValueError, match="unknown"):
        make_policy(name)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(adacorr.policies, "__path__", [str(tmp_path)])  # as if it were in the folder of policies
    monkeypatch.delitem(sys.modules, f"adacorr.policies.{name}", raising=False)
    summary = policies()[name].__doc__.splitlines()[0]
    assert name in adacorr.available()
    assert re.search(rf"\b{name}\b", script.make_parser().format_help())
    assert main(["methods"]) == 0
    listed, key = capsys.readouterr().out, options.partition("=")[0]
    assert all(words in listed for words in (f"--cache {name}  (", summary, f"      {key}="))
    ckpt, record = save_tiny(tmp_path / "tiny.safetensors"), tmp_path / "x.json"
    flags = ["--ckpt", ckpt, "--class-labels", "1", "--device", "cpu", "--out", tmp_path / "x.png", "--record", record]
    for correction in ([], ["--adacorr"]):
        assert script.main([*map(str, flags), "--cache", f"{name}:{options}", *correction]) == 0
        assert 0 < json.loads(record.read_text())["compute"] < 1
    keeps_the_contract(lambda model, **run: make_policy(f"{name}:{options}"), tiny_dit())
    with pytest.raises(ValueError, match=f"{name} has no option '{key}s'.*did you mean {key}"):
        make_policy(f"{name}:{key}s=2")


# ---------------------------------------------------------------------------------------------------- views


def test_a_view_shows_the_stream_halves_first_and_the_age_of_the_unit(model):
    seen = []

    class Watching(Scheduled):
        def decide(self, view):
            modulated, (shift, scale, gate) = view.modulated(), view.modulation
            seen.append((view.step, view.unit, view.x.shape, view.age.tolist()))
            six = view.block.modulation(view.conditioning.c)
            first = 3 if view.unit.branch == "mlp" else 0
            own = [v.view(2, 2, 1, 32) for v in six[first : first + 3]]
            assert_close((shift, scale, gate), tuple(own))
            normal = torch.nn.functional.layer_norm(view.x, (32,), eps=1e-6)
            assert_close(modulated, normal * (1 + own[1]) + own[0], rtol=1e-4, atol=1e-5)
            assert (view.x_in == view.x).all() == (view.unit.start == 0)
            return super().decide(view)

    spans = ((0, 2), (2, 3, "attn"), (2, 3, "mlp"))
    policy = Watching(steps=((0, 3), (0, 2, 3)), stored=Predictor("residual", 0), spans=spans)
    run(model, policy, steps=5, labels=(1, 4))
    assert [s[:2] for s in seen] == [(step, Unit(*span)) for step in range(5) for span in spans]
    assert {tuple(s[2]) for s in seen} == {(2, 2, 16, 32)}
    assert [s[3] for s in seen if s[1].start == 0] == [[0, 0], [1, 1], [2, 2], [3, 1], [1, 1]]


def test_the_age_is_that_of_the_unit_and_not_of_the_stack(model):
    ages = {0: [], 1: []}

    class Watching(type(make_policy("first_block"))):
        def decide(self, view):
            ages[view.unit.start].append(view.age.tolist())
            return super().decide(view)

    run(model, Watching(threshold=math.inf), steps=4, labels=(1,))
    assert ages == {0: [[0], [1], [1], [1]], 1: [[0], [1], [2], [3]]}


@pytest.mark.parametrize("kind", ["branches", "residual"])
def test_branches_as_units_equal_the_stack_as_one(kind, model):
    """The same schedule over single branches, whole blocks and the stack: held branch outputs, or held residuals."""
    outs = []
    for spans in (((0, 3),), ((0, 1), (1, 3)), tuple((u.start, u.stop, u.branch) for u in by_branch(3))):
        policy = Scheduled(steps=((0, 2, 5), (0, 3)), stored=Predictor(kind, 0, gate_error=0), spans=spans)
        manager, out = run(model, policy, labels=(1, 4))
        assert computed(manager) == [[0, 2, 5], [0, 3]]
        outs.append(out)
    for out in outs[1:]:
        assert_close(out, outs[0], rtol=1e-3, atol=2e-4)


def test_single_branches_are_reused_alone(model):
    """Attention held from the first step, MLPs fresh, against the plain blocks with the held outputs put in."""

    class Attention(Scheduled):
        def decide(self, view):
            return view.everyone(view.unit.branch == "mlp" or view.step == 0)

    spans = tuple((u.start, u.stop, u.branch) for u in by_branch(3))
    manager, out = run(model, Attention(stored=Predictor("branches", 0), spans=spans), labels=(1, 4))
    twin = HeldBranches(lambda step, _, branch: branch or step == 0)
    assert_close(out, sample_with(twin, model, labels=(1, 4)), rtol=1e-4, atol=1e-5)
    attn, mlp = model.branch_flops()
    modulations = 9 * 6 * 32 * 32 / (10 / 3)  # fresh gates: nine of ten steps, half of adaLN
    assert manager.trace.compute == pytest.approx((attn / 10 + mlp + modulations / 3) / (attn + mlp))
    assert manager.trace.hit_rate == pytest.approx(0.45)


def test_what_reuse_gives_is_added_and_what_it_ran_is_counted(model):
    """A policy that stores nothing and runs half of the tokens of one block itself."""

    class Half(Scheduled):
        def reuse(self, view, cached):
            assert cached.images.tolist() == [1]
            view.spend(1, "mlp", cached.images, 0.5)
            view.spend_flops(7)
            return torch.full_like(cached.x, 0.25)

    manager, _ = run(model, Half(steps=(tuple(range(10)), (0, 1))), labels=(1, 4))
    executed = manager.trace.executed
    assert (executed[:, :, :, 0] == 1).all()
    assert (executed[2:, 1, 1, 1] == 0.5).all()
    assert executed[2:, :, :, 1].sum() == 8 * 2 * 0.5
    assert manager.trace.extra_flops == 8 * 7


def test_a_policy_that_stores_nothing_must_say_what_to_reuse(model):
    with pytest.raises(ValueError, match="without a predictor must override"):
        run(model, Scheduled(), labels=(1,))


@torch.no_grad()
def test_the_noise_that_the_network_predicts_can_be_changed():
    """Rows [conditional; unconditional] of noise, then variance, whose output layer gives 0, 1, ... by channel."""
    model = DiT(**{**TINY, "depth": 1, "learn_sigma": True}).eval()
    model.final_layer.linear.bias.copy_(torch.arange(6.0).repeat(4))
    told = []

    class Changing(Scheduled):
        def network_output(self, info, step, noise):
            told.append((step, noise.shape, noise[:, 1, :, 0, 0].tolist()))
            return torch.stack([noise[0] + 10, -noise[1]])

    sampler, labels, manager = make_sampler("ddim", 2), torch.tensor([1, 4]), CacheManager(Changing(stored=HELD))
    out = show(model, manager, sampler, torch.zeros(2, 2, 3, 8, 8), labels)
    assert told == [(step, (2, 2, 3, 8, 8), [[0, 1, 2], [0, 1, 2]]) for step in range(2)]
    by_channel = [[10, 11, 12, 3, 4, 5]] * 2 + [[0, -1, -2, 3, 4, 5]] * 2
    assert out[..., 0, 0].tolist() == [by_channel] * 2
    told.clear()
    show(model, CacheManager(Changing(), AdaCorrection()), sampler, torch.zeros(2, 2, 3, 8, 8), labels)
    model(torch.zeros(2, 3, 8, 8), torch.zeros(2), labels)
    assert told == []


@torch.no_grad()
def test_a_step_may_compute_the_conditional_half_alone(model):
    seen = []

    class Alone(Scheduled):
        def conditional_only(self, info, step):
            return step == 1

        def decide(self, view):
            seen.append((view.x.shape[0], view.x_in.shape[0], view.modulation[0].shape[0]))
            return super().decide(view)

    sampler, labels = make_sampler("ddim", 3), torch.tensor([1, 4])
    states = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    policy, manager = Alone(steps=((0, 1, 2),)), CacheManager(Alone(steps=((0, 1, 2), (0, 1))))
    plain = torch.stack([model(*rows_at(model, sampler, s, x, labels, 2)) for s, x in enumerate(states)])
    out = show(model, CacheManager(policy), sampler, states, labels)
    assert seen == [(2, 2, 2), (1, 1, 1), (2, 2, 2)]
    assert torch.equal(out[[0, 2]], plain[[0, 2]])
    assert_close(out[1, :2], plain[1, :2])
    manager.policy.reuse = lambda view, cached: torch.zeros_like(cached.x)
    show(model, manager, sampler, states, labels)
    executed = manager.trace.executed[:, 0, 0]  # (steps, images, halves)
    assert executed.tolist() == [[[1, 1], [1, 1]], [[1, 0], [1, 0]], [[1, 1], [0, 0]]]
    with pytest.raises(ValueError, match="leaves out one half in step 1 and has a predictor"):
        show(model, CacheManager(Alone(stored=HELD)), sampler, states, labels)
    with open_run(model, CacheManager(policy), sampler, labels) as opened:  # a loop that keeps the output to itself
        x, c = torch.zeros(4, 16, 32), torch.zeros(4, 32)
        for step in (0, 1):
            opened.begin_step(step)
            with pytest.raises(RuntimeError, match="step 0: put the output through") if step else nullcontext():
                opened.run_blocks(model.blocks, x, c)
    show(model, CacheManager(policy), sampler, states, labels, cfg_scale=1.0)
    assert seen[-3:] == [(1, 1, 1)] * 3
    assert model.cache is None


@pytest.mark.parametrize("decided", [np.ones(3, dtype=bool), np.ones((2, 1), dtype=bool), True])
def test_decisions_of_another_shape_raise(model, decided):
    class Wrong(Scheduled):
        def decide(self, view):
            return decided

    with pytest.raises(ValueError, match="'scheduled' decided with shape"):
        run(model, Wrong(), labels=(1, 2))
    assert model.cache is None


@pytest.mark.parametrize(
    "spans",
    [((0, 2),), ((0, 1), (2, 3)), ((1, 3),), ((0, 2), (1, 3)), ((0, 2, "attn"), (0, 3)), ((0, 3), (2, 3, "mlp"))],
)
def test_units_that_do_not_follow_one_another_raise(model, spans):
    with pytest.raises(ValueError, match="units must follow"):
        run(model, Scheduled(spans=spans))
    assert model.cache is None
