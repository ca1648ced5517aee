"""Taking steps again under a pipeline: which schedulers allow it, how the state moves, and what switches it off."""

import copy
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from tiny_diffusers import FLOW, PLAIN, PLAIN_BETAS, STEPS, draw, toy_pipeline

from adacorr.corrected_run import CorrectedRun
from adacorr.integrations.diffusers import CacheConfig, enable
from adacorr.integrations.diffusers.attach import Attachment
from adacorr.integrations.diffusers.rewinding import UNEXPECTED, Rewinding
from adacorr.linear_steps import LinearSteps, linear_steps, remembered


def test_steps_of_ddim_and_of_flow_matching():
    scheduler = diffusers.DDIMScheduler(**PLAIN, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    known = scheduler.alphas_cumprod.double().numpy()[scheduler.timesteps.numpy()]
    after = np.append(known[1:], 1.0)
    keep = np.sqrt(after / known)
    expected = np.stack([keep, np.sqrt(1 - after) - keep * np.sqrt(1 - known)], axis=1)
    steps = linear_steps(scheduler, scheduler.timesteps)
    np.testing.assert_allclose(np.stack([steps.carry[:, 0, 0], steps.gain[:, 0]], axis=1), expected, rtol=1e-5)
    alone = linear_steps(scheduler, scheduler.timesteps, remembers=False)
    np.testing.assert_allclose(np.stack([alone.carry[:, 0, 0], alone.gain[:, 0]], axis=1), expected, rtol=1e-5)
    multistep = diffusers.DPMSolverMultistepScheduler(**PLAIN_BETAS, final_sigmas_type="zero")
    multistep.set_timesteps(10)
    first = linear_steps(multistep, multistep.timesteps, remembers=False)  # by its first order it is DDIM
    known = multistep.alphas_cumprod.double().numpy()[multistep.timesteps.numpy()]
    keep = np.sqrt(np.append(known[1:], 1.0) / known)
    np.testing.assert_allclose(first.carry[:, 0, 0], keep, rtol=1e-3)
    assert not first.carry[:, 0, 1:].any()

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(5)
    found = linear_steps(flow, flow.timesteps[2:])  # a run may begin with a later step
    np.testing.assert_allclose(found.carry, 1.0)
    np.testing.assert_allclose(found.gain[:, 0], np.diff(flow.sigmas.numpy())[2:], rtol=1e-5)
    assert flow.step_index is None  # a copy was tried


class Elsewhere(torch.Tensor):
    """As a table on a GPU is: numbers that cannot be combined with tensors on the CPU before they are brought there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.__deepcopy__:
            return args[0].as_subclass(torch.Tensor).clone().as_subclass(cls)
        if any(type(value) is torch.Tensor for value in args):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tables_that_a_pipeline_put_on_its_device_are_brought_back():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    expected = linear_steps(flow, flow.timesteps)
    flow.sigmas, flow.timesteps = flow.sigmas.as_subclass(Elsewhere), flow.timesteps.as_subclass(Elsewhere)
    np.testing.assert_array_equal(linear_steps(flow, flow.timesteps).gain, expected.gain)
    assert type(flow.sigmas) is Elsewhere  # a copy was tried


@pytest.mark.parametrize(
    ("kind", "options", "linear"),
    [
        ("DDIMScheduler", {**PLAIN, "prediction_type": "v_prediction"}, True),
        ("DDIMScheduler", {**PLAIN, "clip_sample": True}, False),
        ("DDIMScheduler", {**PLAIN, "thresholding": True}, False),
        ("CogVideoXDDIMScheduler", {"clip_sample": False}, True),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, False),
        ("DPMSolverMultistepScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, False),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, False),
        ("UniPCMultistepScheduler", {"solver_order": 3}, True),
        ("DEISMultistepScheduler", {}, True),
        ("DDPMScheduler", PLAIN, False),
    ],
)
def test_which_schedulers_take_linear_steps(kind, options, linear):
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(6)
    before = torch.get_rng_state()
    assert (linear_steps(scheduler, scheduler.timesteps) is not None) == linear
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's noise is another


MULTISTEP = [
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, **FLOW}),
    ("DEISMultistepScheduler", {}),
]


@pytest.mark.parametrize(("kind", "options"), MULTISTEP)
def test_a_multistep_scheduler_is_followed_with_what_it_remembers(kind, options):
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(8)
    steps, x = linear_steps(scheduler, scheduler.timesteps), torch.randn(2, 3, 4, 4)
    z = torch.cat([x, *(torch.zeros_like(x) for _ in remembered(scheduler))], dim=1)
    for step, t in enumerate(scheduler.timesteps):
        out = torch.randn_like(x)
        z, x = steps.take(step, z, out), scheduler.step(out, t, x, return_dict=False)[0]
        there = torch.cat([x, *(torch.zeros_like(x) if m is None else m for m in remembered(scheduler))], dim=1)
        torch.testing.assert_close(z, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "options"), MULTISTEP)
def test_a_pipeline_with_a_memory_goes_on_as_one_that_was_better_all_along(kind, options):
    """From step 4 on, in which the core learns what another run is like."""
    count, learnt = 25, 4
    shape, scheduler = (2, 3, 4, 4), getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(count)
    better, x = copy.deepcopy(scheduler), torch.randn(shape)
    steps, other = linear_steps(scheduler, scheduler.timesteps), x + 0.3 * torch.randn(shape)

    def network(step, state):
        return torch.tanh(state * (1 + step / count))

    def correct(z, out, evaluate, advance):
        if run.step != learnt:
            return z, out
        return torch.cat([other, *remembered(better)], dim=1), network(learnt, other)

    run = SimpleNamespace(step=0, info=SimpleNamespace(images=2), halves=1, correct=correct)
    own = Rewinding(run, steps, scheduler, True)
    for step, t in enumerate(scheduler.timesteps):
        run.step, out = step, network(step, x)
        assert own.begin(x, t) == ""
        assert own.correct(x, out, None) == ""
        x = scheduler.step(out, t, x, return_dict=False)[0]
        other = better.step(network(step, other), t, other, return_dict=False)[0]
        if step >= learnt:
            torch.testing.assert_close(x, other, rtol=1e-3, atol=1e-3)
    memories = zip(remembered(scheduler), remembered(better), strict=True)
    assert all((mine - its).norm() < 0.1 * its.norm() for mine, its in memories)


@pytest.mark.parametrize("conditional_first", [True, False])
@pytest.mark.parametrize(("halves", "channels"), [(1, 3), (2, 3), (2, 6)])
def test_the_scheduler_makes_the_better_state_of_the_output(halves, channels, conditional_first):
    a, b, scale, n = 1.25, -0.5, 3.0, 2
    x, better, answer = torch.randn(3, n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def correct(state, out, evaluate, advance):
        seen.append(out.clone())
        seen.append(evaluate(0, answer[1:], np.array([1])))
        torch.testing.assert_close(advance(0, x, answer, np.arange(n)), 2.0 * x + 3.0 * answer)
        return better, answer

    run = SimpleNamespace(step=1, info=SimpleNamespace(images=n, cfg_scale=scale), halves=halves, correct=correct)
    steps = LinearSteps(np.array([[[2.0]], [[a]]]), np.array([[3.0], [b]]))
    own = Rewinding(run, steps, None, conditional_first)
    rows, out = torch.cat([x] * halves), torch.randn(halves * n, channels, 4, 4)
    given, again = out.clone(), torch.randn(halves * n, channels, 4, 4)

    def guided(of):
        if halves == 1:
            return of[:, :3]
        cond, uncond = of[:, :3].chunk(2) if conditional_first else reversed(of[:, :3].chunk(2))
        return uncond + scale * (cond - uncond)

    def replay(step, other, images):
        assert step == 0
        assert torch.equal(other, torch.cat([torch.stack([x[0], answer[1]])] * halves))  # the other image as it is
        return again

    assert own.begin(rows, 999) == ""
    assert own.correct(rows, out, replay) == ""
    torch.testing.assert_close(seen[0], guided(given))
    torch.testing.assert_close(seen[1], guided(again)[1:])
    torch.testing.assert_close(a * x + b * guided(out), a * better + b * answer, atol=1e-4, rtol=1e-4)
    assert torch.equal(out[:, 3:], given[:, 3:])
    after = torch.cat([a * better + b * answer] * halves)
    assert own.begin(after, 998) == ""
    assert own.begin(1.01 * after, 998) == UNEXPECTED
    places = own.rows_of(np.array([1])).tolist()
    assert places == ([1] if halves == 1 else [1, 3] if conditional_first else [3, 1])


def test_an_output_of_other_tokens_is_left_alone():
    run = SimpleNamespace(step=0, info=SimpleNamespace(images=1), halves=1)
    own, rows = Rewinding(run, None, None, True), torch.zeros(1, 4, 2, 2)
    assert "(2, 2, 2)" in own.correct(rows, torch.zeros(1, 2, 2, 2), None)


@pytest.fixture
def replays(monkeypatch, everywhere):
    """Each step that is computed is also replayed, for all images and for one: what the stack added gives its output.

    How often, in a list.
    """
    done, correct = [], CorrectedRun.correct

    def checked(run, x, out, evaluate, advance):
        halves = run.newest_added.unflatten(0, (run.halves, -1))
        for images in (np.arange(len(x)), np.array([1])):
            again = run._replay(run.step, x[images], images, halves[:, images].flatten(0, 1), evaluate)
            torch.testing.assert_close(again, out[images], atol=1e-4, rtol=1e-4)
            done.append(run.step)
        return correct(run, x, out, evaluate, advance)

    monkeypatch.setattr(CorrectedRun, "correct", checked)
    return done


# Those of Wan and HunyuanVideo call the guidance halves apart.
REWINDING = ["dit", "dit unipc", "pixart", "pixart ddim", "sd3", "sd3 unipc", "flux", "wan", "wan unipc", "hunyuan"]


@pytest.mark.parametrize("name", REWINDING)
def test_a_step_that_is_taken_again_gives_what_it_gave(name, replays):
    pipe, call = toy_pipeline(name)
    with enable(pipe, CacheConfig(adacorr="budget=3,order=0")) as cache:
        draw(pipe, call)
        assert cache.stats()["rewound"] > 0
    assert replays == sorted([*range(STEPS)] * 2)


@pytest.mark.parametrize("name", REWINDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pipelines_rewind(name, dtype, everywhere):
    pipe, call = toy_pipeline(name)
    pipe = pipe.to(dtype)
    call = {key: value.to(dtype) if torch.is_tensor(value) else value for key, value in call.items()}
    images = []
    for spec in ("budget=3,order=0", "budget=3,order=0,rewind=false"):
        with enable(pipe, CacheConfig(adacorr=spec)) as cache:
            images.append(draw(pipe, call))
            assert torch.equal(draw(pipe, call), images[-1])
            assert cache.stats()["not_rewound"] == {}
            assert cache.stats()["bytes"] > 0
            assert cache._attachment.sampling is None  # which holds tensors
            assert (cache.stats()["rewound"] > 0) == ("false" not in spec)
    assert not torch.equal(*images)


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)], ids=str)
def test_a_state_that_the_pipeline_edits_ends_the_rewinding(dtype, change, everywhere):
    """In one image of two, and by little more than rounding may be."""
    pipe, call = toy_pipeline("sd3")
    pipe = pipe.to(dtype)
    call = {key: value.to(dtype) if torch.is_tensor(value) else value for key, value in call.items()}

    def edit(pipe, i, t, kept):
        first, *others = kept["latents"]
        return {"latents": torch.stack([first * (1 + change), *others])}

    call["callback_on_step_end"] = edit
    images = []
    for spec in ("budget=3,order=0", "budget=3,order=0,rewind=false"):
        with enable(pipe, CacheConfig(adacorr=spec)) as cache:
            images.append(draw(pipe, call))
            assert cache.stats()["not_rewound"] == ({} if "false" in spec else {UNEXPECTED: 1})
    assert torch.equal(*images)


def test_what_cannot_rewind_says_so():
    pipe, call = toy_pipeline("pixart")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    with enable(pipe, CacheConfig(adacorr="budget=3,order=0")) as cache:
        draw(pipe, call)
        stats = cache.stats()
    assert stats["rewound"] == 0
    assert stats["not_rewound"] == {"steps of DPMSolverMultistepScheduler that are not known to be linear": 1}


def test_a_failure_while_a_step_is_taken_again_ends_the_run(monkeypatch, everywhere):
    pipe, call = toy_pipeline("sd3")
    with enable(pipe, CacheConfig(adacorr="budget=3,order=0")):
        first = draw(pipe, call)
        with monkeypatch.context() as patch:
            patch.setattr(Rewinding, "rows_of", lambda own, images: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                draw(pipe, call)
        assert torch.equal(draw(pipe, call), first)


def test_where_nothing_rewinds_the_scheduler_is_not_tried(monkeypatch):
    pipe, call = toy_pipeline("sd3")
    monkeypatch.setattr(Attachment, "linear_steps", lambda *_: pytest.fail("tried"))
    for config in (CacheConfig(adacorr="budget=3,rewind=false"), CacheConfig(cache="interval", adacorr=None)):
        with enable(pipe, config):
            draw(pipe, call)
