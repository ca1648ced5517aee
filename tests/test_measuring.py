"""The profile of a pipeline's transformer: what is measured, by hand, what it does to a run, and what is refused."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny_diffusers import STEPS, draw, toy_pipeline

from adacorr import AdaCorrection, CacheManager, control, manager
from adacorr.calibration import stack
from adacorr.calibration.stack import StackCalibration
from adacorr.corrected_run import CorrectedRun
from adacorr.integrations.diffusers import CacheConfig, enable, measure
from adacorr.integrations.diffusers.measuring import SEED
from adacorr.linear_steps import LinearSteps
from adacorr.model_profile import KINDS
from adacorr.profile import STACK, Profile, load_profile, save_profile
from adacorr.stack_profile import StackProfile


def made(name):
    """(pipeline, arguments of two calls)."""
    pipe, call = toy_pipeline(name)
    call = {**call, "num_inference_steps": STEPS}
    other = {key: value + 0.5 if torch.is_tensor(value) and "mask" not in key else value for key, value in call.items()}
    return pipe, (call, other)


def stack_output(pipe, call, seed):
    """(S, rows, T, D): what all blocks of SD3 add to text and image tokens in an uncached call."""
    first, *_, before_last, last = pipe.transformer.transformer_blocks
    seen = []

    def begin(module, args, kwargs):
        seen.append([kwargs["encoder_hidden_states"], kwargs["hidden_states"]])

    hooks = [first.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks.append(before_last.register_forward_hook(lambda module, args, out: seen[-1].append(out[0])))
    hooks.append(last.register_forward_hook(lambda module, args, out: seen[-1].append(out[1])))  # it leaves text alone
    pipe(**call, generator=torch.Generator().manual_seed(seed))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat([after - text, out - image], dim=1) for text, image, after, out in seen])


def test_mean_and_moments_are_those_of_what_the_blocks_add(tmp_path):
    pipe, calls = made("sd3")
    profile = measure(pipe, calls, tmp_path / "sd3.safetensors")
    assert (profile.method, profile.sampler) == (STACK, "FlowMatchEulerDiscreteScheduler")
    assert (profile.num_sampling_steps, profile.notes) == (STEPS, {"images": 4})
    np.testing.assert_allclose(profile.arrays["timesteps"], pipe.scheduler.timesteps.numpy())
    runs = [stack_output(pipe, call, SEED + number) for number, call in enumerate(calls)]
    uncond, cond = torch.cat([run.unflatten(1, (2, -1)) for run in runs], dim=2).unbind(1)
    for kind, process in (("conditional", cond), ("difference", cond - uncond)):
        mean = process.double().mean(dim=(1, 2), keepdim=True)
        np.testing.assert_allclose(profile.arrays[f"mean_{kind}"], mean[:, :, 0], rtol=1e-3, atol=1e-5)
        rows = (process - mean).flatten(1)
        np.testing.assert_allclose(profile.arrays[f"moments_{kind}"], rows @ rows.T / rows.shape[1], rtol=1e-3)
    again = measure(pipe, calls)
    for name, array in load_profile(tmp_path / "sd3.safetensors").arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


@pytest.mark.parametrize("name", ["dit", "pixart ddim", "sd3", "flux", "wan"])
def test_a_profile_chooses_the_steps_and_the_forecast(name, tmp_path):
    pipe, calls = made(name)
    path = tmp_path / "own.safetensors"
    profile = measure(pipe, calls[:1], path)
    known, cfg = StackProfile.of(profile), profile.cfg_scale
    assert (np.diff(known.schedules.expected) < 0).all()
    plain = draw(pipe, calls[0])
    with enable(pipe, CacheConfig(adacorr="budget=3.5", profile=str(path))) as cache:
        first = draw(pipe, calls[0])
        assert torch.equal(draw(pipe, calls[0]), first)
        stats = cache.stats()
    trace = stats["trace"]
    rows = [known.schedules.at(known.timesteps, row) for row in range(len(known.schedules.rows))]
    rows = [[list(steps) for steps in own][: 1 if cfg == 1.0 else 2] for own in rows]
    assert trace["computed_steps"][0] == trace["computed_steps"][1]
    assert trace["computed_steps"][0] in rows[1:-1]
    assert 2 < stats["evaluations"] <= 3.5
    assert (cfg == 1.0) == (name == "flux")
    assert not torch.equal(first, plain)
    with enable(pipe, CacheConfig(adacorr="gamma=1e6", profile=str(path))):
        torch.testing.assert_close(draw(pipe, calls[0]), plain, atol=1e-5, rtol=1e-5)
    wrong = f"guidance {cfg} there, 3.5"
    if cfg > 1:
        with enable(pipe, CacheConfig(profile=str(path))), pytest.raises(ValueError, match=wrong):
            draw(pipe, calls[0], guidance_scale=3.5)


def test_a_run_has_the_mean_and_the_gates_of_its_profile(tmp_path, monkeypatch):
    pipe, calls = made("dit")
    path, plain = tmp_path / "own.safetensors", tmp_path / "plain.safetensors"
    profile = measure(pipe, calls, path)
    basis, seen = profile.arrays["basis"], []
    with enable(pipe, CacheConfig(adacorr="budget=3.5", profile=str(path))) as cache:
        cache._attachment.observe = lambda now, *_: seen.append(now.run.store.basis)
        first = draw(pipe, calls[0])
        np.testing.assert_allclose(seen[-1], basis, atol=1e-5)
        monkeypatch.setattr(manager, "GATE_ERROR", 0.5)  # in place of 1 %
        draw(pipe, calls[0])
        assert seen[-1].shape[1] < basis.shape[1]
        monkeypatch.undo()
    arrays = {name: 0 * array if name.startswith("mean") else array for name, array in profile.arrays.items()}
    save_profile(plain, replace(profile, arrays=arrays))
    with enable(pipe, CacheConfig(adacorr="budget=3.5", profile=str(plain))):
        assert not torch.equal(draw(pipe, calls[0]), first)


def test_what_is_added_up(monkeypatch):
    """By hand: two steps, one entry, one half."""
    steps = LinearSteps(np.array([[[1.5]], [[2.0]]]), np.array([[-0.5], [-1.0]]))
    own = StackCalibration(np.array([900.0, 100.0]), steps, np.ones((2, 1)), 1.0)
    own.add_reading(1, torch.full((1, 3, 2), 2.0), torch.full((1, 1, 4), 1.0))  # four times the power
    error = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    own.add_response(1, error, [0.5 * error, error + torch.tensor([[0.0, 2.0], [0.0, 0.0]])])
    stored = torch.tensor([[6.0, 0.0], [-2.0, 0.0]]).view(2, 1, 1, 2, 1)  # two tokens of one channel
    own.add_run([stored], torch.full((1, 4), 0.5))
    seen, found = [], [(((0,), ()), 0.04)]
    monkeypatch.setattr(stack, "best_schedules", lambda *given: seen.append(given) or found)
    arrays, notes = own.fit()
    (model, enough), (process,) = seen[0], seen[0][0].processes
    np.testing.assert_allclose(arrays["mean_conditional"].ravel(), [3, -1])
    np.testing.assert_allclose(arrays["moments_conditional"], [[9, -3], [-3, 1]])
    np.testing.assert_allclose((model.carry[:, 0, 0, 0], model.gain[:, 0]), ([1.5 - 0.25, 2.0 - 0.5], [-0.5, -1.0]))
    np.testing.assert_allclose(model.held, [[0.5], [0.5]])  # the first step tells nothing, and the next one stands in
    np.testing.assert_allclose(process.response, [[1], [1]])
    np.testing.assert_allclose(process.scatter, np.sqrt([[2], [2]]))  # power 4 beside the error, of power 2
    np.testing.assert_allclose(model.readout, [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(process.factor[0, :, 0] @ process.factor[0, :, 0].T, [[9, -3], [-3, 1]])
    assert not process.factor[0, :, 1].any()
    assert enough == pytest.approx((stack.ENOUGH * 0.5) ** 2)
    assert (arrays["schedules"].tolist(), arrays["expected"].tolist()) == ([[2, 0]], [0.2])
    assert (float(arrays["contrast"]), notes) == (0.5, {"images": 1})


def test_the_mean_is_read_by_the_basis_of_a_run():
    """At the profile's own steps, along the directions of another basis; at others between them."""
    steps, rng = np.arange(900.0, 0.0, -100.0), np.random.default_rng(0)
    basis, mean = rng.standard_normal((9, 2)), rng.standard_normal((9, 2, 5))
    known = StackProfile(steps, basis, {"conditional": mean}, {}, None, 1.0)
    turned = basis @ np.array([[0.6, -0.8], [0.8, 0.6]])
    found = known.mean_at("conditional", steps, turned).numpy()
    expected = np.einsum("sq,pqd->spd", basis, mean)  # what step s reads of step p
    np.testing.assert_allclose(np.einsum("sq,pqd->spd", turned, found), expected, rtol=1e-5, atol=1e-6)
    flat = StackProfile(steps, np.ones((9, 1)), {"conditional": steps[:, None, None] / 100}, {}, None, 1.0)
    between = flat.mean_at("conditional", np.array([850.0, 140.0]), np.ones((2, 1)))
    np.testing.assert_allclose(between.ravel(), [8.5, 1.4], rtol=1e-5)


def test_what_cannot_be_measured():
    pipe, calls = made("sd3")
    for calls_of_none in ([], calls[0]):
        with pytest.raises(ValueError, match="a list with the arguments of one call of the pipeline at least"):
            measure(pipe, calls_of_none)
    with pytest.raises(ValueError, match=r"own\.txt: the name must end in"):
        measure(pipe, calls, "own.txt")
    with pytest.raises(OSError, match=r"own\.json.*is a file, not a folder"):
        measure(pipe, calls, Path(__file__) / "own.json")
    with pytest.raises(ValueError, match="the same steps and the same guidance"):
        measure(pipe, [calls[0], {**calls[1], "num_inference_steps": STEPS + 1}])
    with pytest.raises(ValueError, match="give calls of more steps"):
        measure(pipe, [{**calls[0], "num_inference_steps": 1}])
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(
        ValueError, match="cannot be measured: steps of FlowMatchEulerDiscreteScheduler that are not known"
    ):
        measure(pipe, calls)
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_a_profile_of_another_model_is_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    pipe, calls = made("sd3")
    profile = measure(pipe, calls[:1])
    for change, words in (
        ({f"mean_{kind}": profile.arrays[f"mean_{kind}"][..., :8] for kind in KINDS}, "width 8 there, 24 here"),
        ({"basis": profile.arrays["basis"].repeat(2, axis=1)}, "mean_conditional must have shape .*integrations.diff"),
    ):
        save_profile(path, replace(profile, arrays=profile.arrays | change))
        with pytest.raises(ValueError, match=words), enable(pipe, CacheConfig(profile=str(path))):
            draw(pipe, calls[0])


def test_a_profile_of_another_method_is_refused():
    with pytest.raises(ValueError, match="'teacache' is none of AdaCorrection's: adacorr, adacorr-stack"):
        CacheManager(correction=AdaCorrection(), profile=Profile("teacache", {}, "x", "ddim", 6, 1.0))


def test_both_halves_of_every_step_are_looked_at(monkeypatch):
    """Also where steps lie so close together that the clocks would leave the difference to its forecast."""
    pipe, calls = made("sd3")
    seen, learn = [], CorrectedRun.learn

    def noted(run, plan, computed):
        seen.append((run.info.images, *map(len, plan.computed.halves)))
        learn(run, plan, computed)

    monkeypatch.setattr(control, "DIFFERENCE_INTERVAL", 1e12)
    monkeypatch.setattr(CorrectedRun, "learn", noted)
    measure(pipe, calls[:1])
    assert len(seen) == STEPS
    assert all(images == cond == uncond for images, cond, uncond in seen)
