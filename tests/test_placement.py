"""The expected error of a schedule against the linear recursion that it stands for, and the search over schedules."""

import numpy as np
import pytest

from adacorr.kriging import kriging_weights
from adacorr.linear_steps import LinearSteps
from adacorr.placement import (
    ErrorModel,
    Process,
    best_schedules,
    ddim_steps,
    evaluations,
    improved,
    local_search,
)

STEPS, BANDS, RANK = 12, 2, 3
ALPHA_BAR = np.linspace(0.01, 0.99, STEPS)
GUIDED = ((0, 3, 5, 9), (0, 5, 9))


def with_memory(seed=0):
    """Steps of a sampler that remembers two things."""
    carry, gain = np.split(0.6 * np.random.default_rng(seed).normal(size=(STEPS, 3, 4)), [3], axis=2)
    return LinearSteps(carry, gain[..., 0])


def error_model(seed=0, guided=True, smooth=3.0, scatter=0.3, steps=None):
    """A model of random numbers whose processes are smooth in time."""
    generator = np.random.default_rng(seed)
    time = np.arange(STEPS)
    root = np.linalg.cholesky(np.exp(-(np.subtract.outer(time, time) ** 2) / (2 * smooth**2)) + 1e-6 * np.eye(STEPS))
    processes, shared = [], generator.normal(size=(BANDS, RANK, RANK))  # what the processes have in common
    for weight in (1.0, 0.5)[: 1 + guided]:
        mixed = shared + 0.5 * generator.normal(size=(BANDS, RANK, RANK))
        factor = np.einsum("st,fqr->fsqtr", root, mixed).reshape(BANDS, STEPS, RANK, STEPS * RANK)
        covariance, rest = (np.einsum("fiqr,fjqr->ij", *[factor[:, :, own]] * 2) for own in (slice(2), slice(2, None)))
        answers = generator.uniform(0, 1, size=(STEPS, BANDS)), scatter * generator.uniform(size=(STEPS, BANDS))
        processes.append(Process(factor, covariance, rest, *answers, kept=2, weight=weight))
    held, readout = generator.uniform(0, 1, (STEPS, BANDS)), generator.normal(size=(STEPS, RANK))
    return ErrorModel(steps or ddim_steps(ALPHA_BAR), held, readout, processes)


def simulate(model, schedule, steps):
    """The recursion of the module's docstring step by step, without scatter: e (F, r) at the end."""
    nodes, refreshes = schedule
    noise = [{}, {}]  # of each process's nodes

    def read(i, step, at):  # what the final layer makes of each entry of a process at a step, with the readout of `at`
        return np.einsum("q,fqr->qfr", model.readout[at], model.processes[i].factor[:, step])

    def forecast(i, kept, at):
        rules = model.processes[i].covariance, model.processes[i].rest
        weights = [kriging_weights(rule, np.array(kept), np.array([at]))[0] for rule in rules]
        size = np.linalg.norm(model.readout[:, :2], axis=1)
        out = -read(i, at, at).sum(axis=0)
        for w, v, k in zip(*weights, kept, strict=True):
            seen = read(i, k, at)
            out = out + w * (seen[0] + seen[1] + noise[i][k] * size[at] / size[k]) + v * seen[2]
        return out

    def take(z, step, noise):
        return np.einsum("ij,jfr->ifr", steps.carry[step], z) + steps.gain[step][:, None, None] * noise

    def step_over(z, step, kept):
        wrong = sum(p.weight * forecast(i, kept[i], step) for i, p in enumerate(model.processes))
        return take(z, step, model.held[step][:, None] * z[0] + wrong)

    z = np.zeros((steps.size, BANDS, model.processes[0].factor.shape[3]))  # of the state, and of what is remembered
    kept, last, refreshed, states = [[], []], None, None, {}
    for step in range(STEPS):
        if step not in nodes:
            z = step_over(z, step, kept)
            continue
        both = step in refreshes
        answer = []
        for i, p in enumerate(model.processes):
            if i == 0 or both:
                own = (p.response[step] - (model.held[step] if i == 0 else 0))[:, None] * z[0]
                noise[i][step] = own
                answer.append(p.weight * own)
                kept[i] = (kept[i] + [step])[-p.kept :]
            else:
                answer.append(p.weight * forecast(i, kept[i], step))
        start = last
        if both and len(model.processes) == 2 and refreshed is not None and kept[0][0] <= refreshed:
            between = sum(refreshed < node < step for node in nodes)
            if 0.5 * (step - refreshed - 1 - between) > between:
                start = refreshed
        if start is not None:
            z = states[start]
            for past in range(start + 1, step):
                z = step_over(z, past, kept)
        z = take(z, step, model.held[step][:, None] * z[0] + sum(answer))
        states[step], last = z, step
        if both:
            refreshed = step
    return z[0]


def test_ddim_steps_are_its_update():
    steps, after = ddim_steps(ALPHA_BAR), np.append(ALPHA_BAR[1:], 1.0)
    np.testing.assert_allclose(steps.carry[:, 0, 0], np.sqrt(after / ALPHA_BAR))
    expected = np.sqrt(1 - after) - np.sqrt(after / ALPHA_BAR) * np.sqrt(1 - ALPHA_BAR)
    np.testing.assert_allclose(steps.gain[:, 0], expected)


@pytest.mark.parametrize("steps", [ddim_steps(ALPHA_BAR), with_memory()], ids=["ddim", "with a memory"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "schedule", [((0,), (0,)), ((0, 1, 2), (0, 2)), GUIDED, ((0, 4, 7, 8, 11), (0, 8)), ((0, 2, 5, 11), (0, 5, 11))]
)
def test_the_error_is_that_of_the_recursion(guided, schedule, steps):
    model = error_model(guided=guided, scatter=0.0, steps=steps)
    schedule = schedule if guided else (schedule[0], ())
    expected = (simulate(model, schedule, steps) ** 2).sum()
    assert model.error(schedule) == pytest.approx(expected, rel=1e-9)
    model.error((schedule[0][:2], (0,) if guided else ()))
    assert model.error(schedule) == pytest.approx(expected, rel=1e-9)  # from what it remembers


def test_everything_computed_leaves_nothing_and_scatter_adds():
    model, noisy = error_model(scatter=0.0), error_model(scatter=0.5)
    every = tuple(range(STEPS))
    assert model.error((every, every)) == pytest.approx(0.0, abs=1e-20)
    assert noisy.error(GUIDED) > model.error(GUIDED) > 0


def test_costs():
    assert evaluations(GUIDED, 2) == 3.5
    assert evaluations((GUIDED[0], ()), 1) == 4.0


def test_the_search_finds_what_trying_all_finds():
    """Three computed steps of twelve: every choice is tried."""
    model = error_model(guided=False)
    best = min(model.error(((0, a, b), ())) for a in range(1, STEPS) for b in range(a + 1, STEPS))
    found = {evaluations(schedule, len(model.processes)): error for schedule, error in best_schedules(model, 1e-12)}
    assert found[3.0] == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_without_guidance_nothing_is_refreshed_and_the_last_schedule_computes_everything(seed):
    """Past `enough`, too, where a further step may leave a larger error than the one before."""
    model = error_model(seed, guided=False)
    found = best_schedules(model, 1e-2 * model.error(((0,), ())))
    assert all(refreshes == () for (_, refreshes), _ in found)
    assert found[-1] == ((tuple(range(STEPS)), ()), pytest.approx(0.0, abs=1e-20))


def test_schedules_get_better_with_cost_and_moves_keep_it():
    model = error_model()
    found = best_schedules(model, 1e-4)
    costs, errors = [evaluations(s, len(model.processes)) for s, _ in found], [error for _, error in found]
    assert costs == sorted(set(costs))
    assert errors == sorted(errors, reverse=True)
    for (nodes, refreshes), error in found:
        assert nodes[0] == refreshes[0] == 0
        assert set(refreshes) <= set(nodes) <= set(range(STEPS))
        assert error == model.error((nodes, refreshes))
    better, error = local_search(model, GUIDED)
    assert evaluations(better, 2) == evaluations(GUIDED, 2)
    assert error <= model.error(GUIDED)


def test_trades_find_what_moves_cannot():
    """As many evaluations, in another split into steps and refreshes."""
    model, start = error_model(), ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    moved, traded = local_search(model, start), improved(model, start)
    assert evaluations(traded[0], 2) == evaluations(start, 2)
    assert len(traded[0][1]) != len(start[1])
    assert traded[1] == model.error(traded[0]) < moved[1]
