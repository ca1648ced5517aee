"""The policies: their decisions by hand, the registry, and the contract that every one of them keeps."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import Scheduled, alphas, forced, sample, tiny_dit

import adacorr
from adacorr import AdaCorrection, CacheManager, Predictor, make_policy
from adacorr.policies import load_file, register
from adacorr.policies.teacache import fit_polynomial, read_profile, rescale
from diffusion import make_sampler

BUILT_IN = {"never", "interval", "first_block", "teacache"}
SPECS = sorted(adacorr.available())  # a new file in the folder comes under the contract by itself


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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


def keeps_the_contract(policy, model, device="cpu"):
    """What must hold for any policy, whatever it decides."""
    model = model.to(device)
    for cfg_scale in (1.0, 1.5):
        before = repr(policy), dict(vars(policy))
        manager = CacheManager(policy)
        first = sample(model, cfg_scale=cfg_scale, cache=manager)
        assert (first.shape, first.dtype, first.device.type) == ((3, 3, 8, 8), torch.float32, device)
        assert bool(torch.isfinite(first).all())
        assert model.cache is None
        assert (repr(policy), vars(policy)) == before  # a run works on a copy
        halves = 1 if cfg_scale == 1.0 else 2
        trace = manager.trace
        assert trace.action.shape == (10, 3, 3, halves)
        assert trace.score.shape == trace.weight.shape == (10, 3, 3)
        assert trace.done == 10
        assert trace.action[0].all()  # nothing to reuse in the first step
        assert 0 <= trace.hit_rate < 1
        json.dumps(trace.summary(), allow_nan=False)
        # The second run of the same manager does not see the first.
        assert torch.equal(sample(model, cfg_scale=cfg_scale, cache=manager), first)
        if device == "cpu":
            cached, plain = forced(model, CacheManager(policy), cfg_scale=cfg_scale)
            assert torch.equal(cached[0], plain[0])
    leaves_its_input_alone(policy, model)


@torch.no_grad()
def leaves_its_input_alone(policy, model):
    sampler, device = make_sampler("ddim", 4), model.pos_embed.device
    labels = torch.tensor([1, 2], device=device)
    generator = torch.Generator().manual_seed(3)
    with CacheManager(policy).run(model, labels, sampler.timesteps, alphas(sampler)) as opened:
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
@pytest.mark.parametrize("spec", SPECS)
def test_contract(spec, device):
    keeps_the_contract(make_policy(spec), tiny_dit(), device)


@pytest.mark.parametrize("spec", SPECS)
def test_a_half_precision_model_runs_and_stays_finite(spec):
    model = tiny_dit().to(torch.bfloat16)
    for correction in (None, AdaCorrection()):
        out = sample(model, cache=CacheManager(make_policy(spec), correction))
        assert out.dtype == torch.float32
        assert bool(torch.isfinite(out).all())


# ------------------------------------------------------------------------------------------------ registry


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
        ("teacache:profile=/nowhere/at/all.json", "profile='/nowhere/at/all.json'"),
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
from adacorr.predict import Predictor
from adacorr.types import Policy, View


@register
@dataclass
class Growing(Policy):
    """Gaps that grow by a factor."""

    factor: float = 1.5
    first: int = 1

    @property
    def predictor(self):
        return Predictor("branches", order=1)

    def begin(self, images, num_steps):
        self._due, self._gap = np.zeros(images), np.full(images, float(self.first))

    def decide(self, view: View) -> np.ndarray:
        return view.step >= self._due

    def computed(self, view: View, images: np.ndarray) -> None:
        self._due = np.where(images, view.step + self._gap, self._due)
        self._gap = np.where(images, self._gap * self.factor, self._gap)
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
    keeps_the_contract(make_policy("growing"), model)
    with pytest.raises(ValueError, match="growing has no option 'facto'.*did you mean factor"):
        make_policy("growing:facto=2")
    with pytest.raises(ValueError, match="registered already"):
        load_file(path)


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(("every", "warm", "cold"), [(2, 26, 25), (3, 18, 17), (4, 14, 13), (5, 11, 10), (6, 10, 9)])
def test_interval_computes_the_published_number_of_steps(every, warm, cold):
    """TaylorSeer is full at 0, 1, 1 + N, 1 + 2N, ...; FORA, counted from the first step, at 0, N, 2N, ..."""
    small = tiny_dit(depth=1)
    for warmup, start, count in ((1, 1, warm), (0, 0, cold)):
        manager, _ = run(small, f"interval:every={every},warmup={warmup}", steps=50, labels=(1,), cfg_scale=1.0)
        expected = sorted({0, *range(start, 50, every)})
        assert computed(manager) == [expected]
        assert len(expected) == count
    manager, _ = run(small, "interval:every=1", steps=10, labels=(1,), cfg_scale=1.0)
    assert computed(manager) == [list(range(10))]


# ---------------------------------------------------------------------------------------------- first block


def view(step, tokens, num_steps=10, block=0, **fields):
    """A view of one segment; tokens (halves, n, T, D) are the modulated input, or x with x_in zero."""
    tokens = torch.as_tensor(tokens, dtype=torch.float32)
    return SimpleNamespace(
        step=step, num_steps=num_steps, block=block, x=tokens, x_in=torch.zeros_like(tokens),
        images=tokens.shape[1], modulated=lambda: tokens, **fields,
    )  # fmt: skip


def one(*channels):
    """One half, one image, one token."""
    return [[[list(channels)]]]


def decisions(policy, views):
    """What a policy decides when it is always obeyed."""
    policy.begin(views[0].images, views[0].num_steps)
    decided = []
    for seen in views:
        decided.append(policy.decide(seen).tolist())
        policy.computed(seen, np.array(decided[-1]))
    return decided


def test_first_block_compares_with_the_last_computed_step():
    residuals = [one(1.0, 1.0), one(1.1, 0.9), one(1.2, 0.9), one(1.3, 1.0), one(1.4, 1.0)]
    views = [view(step, r, block=1) for step, r in enumerate(residuals)]
    decided = decisions(make_policy("first_block:threshold=0.12"), views)
    # 0.2 / 2, 0.3 / 2 to the first; 0.2 / 2.1, 0.3 / 2.1 to the third.
    assert decided == [[True], [False], [True], [False], [True]]
    decided = decisions(make_policy("first_block:threshold=0.099"), views)
    # 0.2 / 2 to the first; 0.1 / 2, 0.3 / 2 to the second; 0.1 / 2.3 to the fourth.
    assert decided == [[True], [True], [False], [True], [False]]


def test_first_block_measures_the_residual_and_not_the_stream():
    policy = make_policy("first_block:threshold=0.1")
    views = [view(step, one(1.0, 1.0), block=1) for step in range(2)]
    for seen, stream in zip(views, (3.0, 7.0), strict=True):
        seen.x, seen.x_in = seen.x + stream, seen.x_in + stream
    assert decisions(policy, views) == [[True], [False]]


def test_first_block_always_computes_the_first_block():
    policy = make_policy("first_block:threshold=1e9")
    policy.begin(1, 10)
    for step in range(3):
        assert policy.decide(view(step, one(1.0, 1.0), block=0)).all()


@pytest.mark.parametrize("name", ["first_block", "teacache"])
def test_scope_is_the_image_with_its_halves_or_the_batch(name):
    # Image 0 moves in its unconditional half only, image 1 does not move.
    before, now = torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 2)
    now[1, 0] = 1.4  # 0.2 over both halves of image 0, 0.1 over the batch
    views = [view(0, before, block=1), view(1, now, block=1)]
    for threshold, image, batch in (
        (0.15, [True, False], [False, False]),
        (0.05, [True, False], [True, True]),
    ):
        assert decisions(make_policy(f"{name}:threshold={threshold}"), views)[1] == image
        assert decisions(make_policy(f"{name}:threshold={threshold},scope=image"), views)[1] == image
        assert decisions(make_policy(f"{name}:threshold={threshold},scope=batch"), views)[1] == batch


def test_first_block_keeps_a_reference_for_each_image():
    steps = [[1.0, 1.0], [1.3, 1.1], [1.3, 1.2], [1.4, 1.25]]  # image by image
    views = [view(i, torch.tensor(s).view(1, 2, 1, 1), block=1) for i, s in enumerate(steps)]
    assert decisions(make_policy("first_block:threshold=0.12"), views) == [
        [True, True],
        [True, False],
        [False, True],  # 0 to 1.3, 0.2 to 1.0
        [False, False],  # 0.08 to 1.3, 0.04 to 1.2
    ]


def test_first_block_thresholds_0_and_infinity(model):
    manager, out = run(model, "first_block:threshold=0")
    assert computed(manager) == [list(range(10))] * 3
    assert torch.equal(out, sample(model))
    manager, _ = run(model, "first_block:threshold=inf")
    assert computed(manager) == [[0]] * 3
    assert manager.trace.action[:, 0].all()  # the probe itself
    assert not manager.trace.action[1:, 1:].any()
    assert manager.trace.compute == pytest.approx((3 + 9) / 30)


# ------------------------------------------------------------------------------------------------- teacache


def test_teacache_by_hand():
    inputs = [one(1.0, 1.0), one(1.1, 0.9), one(1.3, 0.9), one(1.3, 1.12), one(1.41, 1.23), one(1.41, 1.23)]
    # Changes: 0.1, 0.2 / 2, 0.22 / 2.2, 0.22 / 2.42, 0. Each is measured to the step before, computed or not.
    views = [view(step, m, num_steps=6) for step, m in enumerate(inputs)]
    policy = make_policy("teacache:threshold=0.25")
    assert decisions(policy, views) == [[True], [False], [False], [True], [False], [True]]
    assert policy._sum == pytest.approx(0.0)  # the last step is computed and resets, as every other
    policy = make_policy("teacache:threshold=0.15")
    assert decisions(policy, views) == [[True], [False], [True], [False], [True], [True]]


def test_teacache_sums_up_for_each_image():
    steps = [[1.0, 1.0], [1.1, 1.0], [1.21, 1.1], [1.21, 1.21], [1.21, 1.21], [1.21, 1.21]]
    views = [view(i, torch.tensor(s).view(1, 2, 1, 1), num_steps=9) for i, s in enumerate(steps)]
    decided = decisions(make_policy("teacache:threshold=0.15"), views)
    assert decided == [
        [True, True],
        [False, False],
        [True, False],
        [False, True],
        [False, False],
        [False, False],
    ]


def test_teacache_thresholds_0_and_infinity(model):
    manager, out = run(model, "teacache:threshold=0")
    assert computed(manager) == [list(range(10))] * 3
    assert torch.equal(out, sample(model))
    manager, _ = run(model, "teacache:threshold=inf")
    assert computed(manager) == [[0, 9]] * 3
    assert manager.trace.compute == pytest.approx(0.2)


def test_the_polynomial_is_held_in_its_range_and_above_0():
    fit = {"coefficients": [1.0, 0.0, -0.01], "range": [0.05, 0.5]}
    assert_close(
        torch.from_numpy(rescale(np.array([0.2, 0.5, 3.0, 0.05, 0.0]), fit)),
        torch.tensor([0.03, 0.24, 0.24, 0.0, 0.0], dtype=torch.float64),
    )


def test_a_profile_is_used(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"teacache": {"coefficients": [2.0, 0.0], "range": [0.0, 1.0]}}))
    views = [view(step, one(1.1**step), num_steps=9) for step in range(4)]
    assert decisions(make_policy("teacache:threshold=0.35"), views) == [[True], [False], [False], [False]]
    doubled = make_policy(f"teacache:threshold=0.35,profile={path}")
    assert decisions(doubled, views) == [[True], [False], [True], [False]]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"teacache": 3}', '{"teacache": {"coefficients": [1]}}'])
def test_a_broken_profile_raises_and_says_how_to_make_one(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="adacorr.calibrate"):
        read_profile(str(path))


def test_the_fit_finds_the_polynomial():
    change = np.linspace(0.1, 0.9, 12)
    wanted = [3.0, -2.0, 0.5, 1.0, 0.1]
    fit = fit_polynomial(change, np.polyval(wanted, change))
    np.testing.assert_allclose(fit["coefficients"], wanted, atol=1e-8)
    assert fit["range"] == [0.1, 0.9]
    with pytest.raises(ValueError, match="4 pairs cannot fit degree 4"):
        fit_polynomial(change[:4], change[:4])


# ------------------------------------------------------------------------------------------- what they see


def test_a_view_shows_the_stream_halves_first_and_the_age_of_the_segment(model):
    seen = []

    class Watching(Scheduled):
        def decide(self, view):
            modulated = view.modulated()
            seen.append((view.step, view.block, view.x.shape, view.age.tolist()))
            shift, scale = view.blocks[view.block].modulation(view.c[0])[:2]
            normal = torch.nn.functional.layer_norm(view.x[0], (32,), eps=1e-6)
            expected = normal * (1 + scale[:, None]) + shift[:, None]
            assert_close(modulated[0], expected, rtol=1e-4, atol=1e-5)
            assert (view.x_in == view.x).all() == (view.block == 0)
            return super().decide(view)

    policy = Watching(steps=((0, 3), (0, 2, 3)), stored=Predictor("residual", 0), spans=((0, 2), (2, 3)))
    run(model, policy, steps=5, labels=(1, 4))
    assert [s[:2] for s in seen] == [(step, block) for step in range(5) for block in (0, 2)]
    assert {tuple(s[2]) for s in seen} == {(2, 2, 16, 32)}
    assert [s[3] for s in seen if s[1] == 0] == [[0, 0], [1, 1], [2, 2], [3, 1], [1, 1]]


def test_the_age_is_that_of_the_segment_and_not_of_the_stack(model):
    ages = {0: [], 1: []}

    class Watching(type(make_policy("first_block"))):
        def decide(self, view):
            ages[view.block].append(view.age.tolist())
            return super().decide(view)

    run(model, Watching(threshold=math.inf), steps=4, labels=(1,))
    assert ages == {0: [[0], [1], [1], [1]], 1: [[0], [1], [2], [3]]}


@pytest.mark.parametrize("decided", [np.ones(3, dtype=bool), np.ones((2, 1), dtype=bool), True])
def test_decisions_of_another_shape_raise(model, decided):
    class Wrong(Scheduled):
        def decide(self, view):
            return decided

    with pytest.raises(ValueError, match="'scheduled' decided with shape"):
        run(model, Wrong(), labels=(1, 2))
    assert model.cache is None


@pytest.mark.parametrize("spans", [((0, 2),), ((0, 1), (2, 3)), ((1, 3),), ((0, 2), (1, 3))])
def test_segments_that_do_not_follow_one_another_raise(model, spans):
    with pytest.raises(ValueError, match="segments must follow"):
        run(model, Scheduled(spans=spans))
    assert model.cache is None
