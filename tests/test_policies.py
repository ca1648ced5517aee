"""The policies: their decisions by hand, the registry, and the contract that every one of them keeps."""

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import Scheduled, alphas, fitted, forced, sample, sample_with, tiny_dit

import adacorr
from adacorr import AdaCorrection, CacheManager, Predictor, Unit, by_branch, make_policy
from adacorr.policies import calibrated, load_file, register
from diffusion import make_sampler

BUILT_IN = {
    "adacache", "dicache", "ertacache", "fastcache", "first_block", "interval", "lazydit", "magcache", "never", "rfc",
    "smoothcache", "taylorseer", "teacache",
}  # fmt: skip
NAMES = sorted(adacorr.available())  # a new file in the folder comes under the contract by itself


@pytest.fixture
def registry(monkeypatch):
    """Policies registered in a test are forgotten after it."""
    monkeypatch.setattr(adacorr.policies, "_POLICIES", dict(adacorr.policies._POLICIES))


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


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
            assert manager.bytes >= 0
            json.dumps(trace.summary(), allow_nan=False)
            # The second run of the same manager does not see the first.
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where profiles of the toy model are kept for all tests."""
    return tmp_path_factory.mktemp("profiles")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, device, folder):
    keeps_the_contract(lambda model, **run: fitted(name, model, folder, **run), tiny_dit(), device)


@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_model_runs_and_stays_finite(name, folder):
    policy = fitted(name, tiny_dit(), folder)
    model = tiny_dit().to(torch.bfloat16)
    for correction in (None, AdaCorrection()):
        out = sample(model, cache=CacheManager(policy, correction))
        assert out.dtype == torch.float32
        assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("corrected", [False, True], ids=["alone", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_alone_and_in_any_batch(name, corrected, folder, model):
    manager = CacheManager(fitted(name, model, folder, steps=20), AdaCorrection(gamma=0.3) if corrected else None)
    labels = (3, 0, 1, 4)
    together = sample(model, 20, labels, cache=manager)
    ran = manager.trace.executed
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


def test_available_describes_every_policy():
    described = adacorr.available()
    assert set(described) >= BUILT_IN
    assert list(described) == sorted(described)
    assert "[every=3]" in described["interval"]
    assert "[threshold=0.1]" in described["teacache"]
    assert all(line[0].isupper() for line in described.values())


def test_an_unknown_policy_lists_every_name():
    with pytest.raises(ValueError, match="unknown.*did you mean teacache") as caught:
        make_policy("teacach:threshold=0.2")
    assert all(name in str(caught.value) for name in BUILT_IN)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("interval:evry=3", "no option 'evry'.*did you mean every"),
        ("interval:every=0", "every=0"),
        ("interval:every=2.5", "every=2.5 must be a whole number"),
        ("interval:order=9", "order=9"),
        ("interval:warmup=-1", "warmup=-1"),
        ("never:every=3", "no option 'every'"),
        ("first_block:threshold=-1", "threshold=-1"),
        ("first_block:threshold=nan", "threshold=nan"),
        ("first_block:scope=pair", "scope='pair'.*image, batch"),
        ("teacache:threshold=-0.1", "threshold=-0.1"),
        ("teacache:threshold=low", "threshold='low' must be a number"),
        ("teacache:scope=row", "scope='row'"),
        ("teacache:profile=/nowhere/at/all.json", "profile=/nowhere/at/all.json does not exist"),
    ],
)
def test_a_wrong_option_raises_and_names_it(spec, message):
    with pytest.raises(ValueError, match=message):
        make_policy(spec)


def test_a_name_can_be_taken_once(registry):
    kind = type(make_policy("interval"))
    with pytest.raises(ValueError, match="'interval' is registered already"):
        register(kind)


def test_only_dataclasses_register(registry):
    class Plain(adacorr.Policy):
        """No dataclass."""

    with pytest.raises(ValueError, match="must be a dataclass"):
        register(Plain)


DROPPED_IN = '''
"""A policy as somebody would write it."""
{imports}
from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.store import Predictor
from adacorr.policy import Policy, Ran, RunInfo, View


@register
@dataclass
class Growing(Policy):
    """Gaps that grow by a factor."""

    factor: float = 1.5
    first: int = 1

    @property
    def predictor(self):
        return Predictor("branches", order=1)

    def begin(self, run: RunInfo) -> None:
        self._due, self._gap = np.zeros(run.images), np.full(run.images, float(self.first))

    def decide(self, view: View) -> np.ndarray:
        return view.step >= self._due

    def computed(self, view: View, ran: Ran) -> None:
        self._due[ran.images] = view.step + self._gap[ran.images]
        self._gap[ran.images] *= self.factor
'''


@pytest.mark.parametrize("imports", ["", "from __future__ import annotations"], ids=["plain", "quoted-types"])
def test_a_new_policy_is_one_short_file(registry, tmp_path, model, imports):
    text = DROPPED_IN.format(imports=imports).lstrip()
    assert len(text.splitlines()) < 80
    path = tmp_path / "growing.py"
    path.write_text(text)
    load_file(path)
    assert " ".join(adacorr.available()["growing"].split()) == "Gaps that grow by a factor. [factor=1.5] [first=1]"
    manager, _ = run(model, "growing:factor=2,first=1", steps=16)
    assert computed(manager) == [[0, 1, 3, 7, 15]] * 3
    keeps_the_contract(lambda model, **run: make_policy("growing"), model)
    with pytest.raises(ValueError, match="growing has no option 'facto'.*did you mean factor"):
        make_policy("growing:facto=2")
    with pytest.raises(ValueError, match="registered already"):
        load_file(path)


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
            return np.full(view.images, view.unit.branch == "mlp" or view.step == 0)

    spans = tuple((u.start, u.stop, u.branch) for u in by_branch(3))
    manager, out = run(model, Attention(stored=Predictor("branches", 0), spans=spans), labels=(1, 4))

    class HeldAttention:
        held = None

        def run_blocks(self, blocks, x, c):
            first, self.held = self.held is None, self.held or []
            for i, block in enumerate(blocks):
                shift, scale, gate, *rest = block.modulation(c)
                if first:
                    self.held.append(block.attn_branch(x, shift, scale))
                x = x + gate.unsqueeze(1) * self.held[i]
                x = x + rest[2].unsqueeze(1) * block.mlp_branch(x, rest[0], rest[1])
            return x

    assert_close(out, sample_with(HeldAttention(), model, labels=(1, 4)), rtol=1e-4, atol=1e-5)
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
