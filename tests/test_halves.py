"""Guidance halves that are called apart: they are cached as one batch, and each call gets what belongs to it."""

import pytest
import torch
from diffusers import FluxPipeline
from tiny_diffusers import SCALE, STEPS, call, draw, guided, inputs, sample, tiny, toy_pipeline, unconditional

from adacorr.integrations.diffusers import CacheConfig, enable
from adacorr.integrations.diffusers.halves import Uncached, joined

INTERVAL = {"adacorr": None, "cache": "interval:every=2,align=start"}


def config(guidance="separate", **options):
    return CacheConfig(num_steps=STEPS, guidance=guidance, guidance_scale=SCALE, **options)


def apart(model, name, latents, other, others=None, between=lambda: None):
    """Sampled with halves in calls of their own; others(t): the inputs of the unconditional one, None for no call."""

    def evaluate(x, t):
        cond, uncond = call(model, name, x, t, other), unconditional(name, len(x)) if others is None else others(t)
        between()
        return cond if uncond is None else SCALE * cond - (SCALE - 1) * call(model, name, x, t, uncond)

    return sample(model, name, latents, other, evaluate=evaluate)


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "wan", "hunyuan"])
@pytest.mark.parametrize("spec", ["interval", "budget"])
def test_they_are_cached_as_in_one_batch(name, spec):
    model, (latents, other) = tiny(name), inputs(name, 2)
    # Half of an evaluation is spent before the two are known to belong together.
    own, batch = ({"adacorr": "budget=3.5"}, {"adacorr": "budget=3"}) if spec == "budget" else (INTERVAL, INTERVAL)
    with enable(model, config("cond_first", **batch)) as cache:
        expected = guided(model, name, latents, other, "cond_first")
        evaluations = cache.stats()["evaluations"]
    with enable(model, config(**own)) as cache:
        images = apart(model, name, latents, other)
        assert torch.equal(apart(model, name, latents, other), images)
        stats = cache.stats()
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    assert (stats["runs"], stats["bypassed"], stats["trace"]["halves"]) == (2, {}, 2)
    assert stats["evaluations"] == pytest.approx(evaluations + 0.5, abs=0.02)


@pytest.mark.parametrize("how", ["other text", "no more", "none"])
def test_the_other_half_changes(how):
    """From the third step on it gets another text or is left out; and it never comes."""
    model, (latents, other) = tiny("flux"), inputs("flux", 2)
    new = inputs("flux", 2, seed=5)[1] if how == "other text" else None

    def others(t):
        return new if how == "none" or t < 700 else unconditional("flux", 2)

    plain = apart(model, "flux", latents, other, others)
    with enable(model, config(adacorr="gamma=1e6")) as cache:
        torch.testing.assert_close(apart(model, "flux", latents, other, others), plain, atol=1e-5, rtol=1e-5)
        assert cache.stats()["runs"] == (1 if how == "none" else 2)
    with enable(model, config(**INTERVAL)) as cache:
        apart(model, "flux", latents, other, others)
        assert cache.stats()["hit_rate"] > 0.3
        assert cache.stats()["trace"]["halves"] == (2 if how == "other text" else 1)


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_loop_that_breaks_off_between_them_leaves_nothing(broken):
    model, (latents, other), count = tiny("flux"), inputs("flux", 2), []

    def between():
        count.append(1)
        if len(count) == broken:
            raise KeyboardInterrupt

    with enable(model, config(**INTERVAL)):
        expected = apart(model, "flux", latents, other)
        for moved in (0, 1):  # of the same noise, too
            count.clear()
            with pytest.raises(KeyboardInterrupt):
                apart(model, "flux", latents + moved, other, between=between)
            assert torch.equal(apart(model, "flux", latents, other), expected)


def test_pipelines_that_give_them_no_name(everywhere):
    """As those of Flux for editing do: two calls at each timestep, without `cache_context`."""
    pipe, cond = toy_pipeline("flux")
    names = "prompt_embeds", "pooled_prompt_embeds"
    both = cond | {f"negative_{name}": cond[name].flip(0) for name in names} | {"true_cfg_scale": 3.0}
    with enable(pipe, CacheConfig(adacorr="budget=3.5,order=0")) as cache:
        draw(pipe, both)
        stats = cache.stats()
        assert (stats["runs"], stats["trace"]["halves"], stats["not_rewound"]) == (1, 2, {})
        assert stats["rewound"] > 0
        draw(pipe, cond)
        assert (cache.stats()["runs"], cache.stats()["trace"]["halves"]) == (2, 1)


def test_a_distilled_scale_announces_no_other_half():
    class Plain(FluxPipeline):  # as the pipelines of Flux without `true_cfg_scale`
        def __call__(self, guidance_scale=3.5, **others):
            return super().__call__(guidance_scale=guidance_scale, **others)

    pipe, given = toy_pipeline("flux")
    with enable(Plain(**pipe.components), CacheConfig(**INTERVAL)) as cache:
        draw(cache._attachment.pipe, given)
        assert (cache.stats()["trace"]["steps"], cache.stats()["hit_rate"]) == (STEPS, 0.5)


def test_other_rounding_in_the_first_step_is_no_edit():
    """There the conditional half comes from a call of its own, in a batch of another size."""
    pipe, given = toy_pipeline("wan")
    pipe.transformer.proj_out.register_forward_hook(lambda m, args, out: out * (1.01 if len(out) == 2 else 1.0))
    with enable(pipe, CacheConfig(adacorr="budget=3.5")) as cache:
        draw(pipe, given)
        assert cache.stats()["not_rewound"] == {}


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_a_further_call_at_a_timestep_runs_as_it_is(name, everywhere):
    pipe, given = toy_pipeline(name)
    last = []

    def again(pipe, i, t, kept):
        pipe.transformer(**last[-1])
        return kept

    with enable(pipe, CacheConfig(adacorr="budget=3.5,order=0")) as cache:
        expected = draw(pipe, given)
        pipe.transformer.register_forward_pre_hook(
            lambda m, args, given: last.append(given), prepend=True, with_kwargs=True
        )
        assert not torch.equal(draw(pipe, given, callback_on_step_end=again), expected)  # which was rewound
        stats, why = cache.stats(), "a further call at a timestep"
    assert (stats["bypassed"], stats["not_rewound"]) == ({why: STEPS}, {why: 1})
    assert stats["runs"] == 2
    assert stats["hit_rate"] > 0.3


def test_the_conditional_half_alone():
    """Where both do not fit into memory as one batch."""
    pipe, given = toy_pipeline("wan")
    rows = []
    pipe.transformer.blocks[0].ffn.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    with enable(pipe, CacheConfig(guidance_scale=1.0, **INTERVAL)) as cache:
        draw(pipe, given)
        stats = cache.stats()
    assert (stats["runs"], stats["hit_rate"], stats["trace"]["halves"]) == (1, 0.5, 1)
    assert stats["bypassed"] == {"a further call at a timestep": STEPS}
    assert set(rows) == {2}


def test_a_caller_may_change_what_it_gets_in_place():
    model, (latents, other) = tiny("wan").requires_grad_(True), inputs("wan", 2)
    with enable(model, config(adacorr="gamma=1e6")):
        for t in (1000.0, 830.0):
            timestep, both = torch.full((2,), t), (other, unconditional("wan", 2))
            halves = [model(hidden_states=latents, timestep=timestep, **given).sample for given in both]
            kept = halves[1].clone()
            halves[0].zero_()
            assert torch.equal(halves[1], kept)


def test_halves_of_other_shapes_run_uncached():
    pipe, given = toy_pipeline("wan")
    plain = draw(pipe, given | {"negative_prompt_embeds": given["negative_prompt_embeds"][:, :3]})
    with enable(pipe, CacheConfig(**INTERVAL)) as cache:
        assert torch.equal(
            draw(pipe, given | {"negative_prompt_embeds": given["negative_prompt_embeds"][:, :3]}), plain
        )
        why = "guidance halves whose encoder_hidden_states makes no batch"
        assert cache.stats()["bypassed"] == {why: STEPS}


def test_what_is_joined():
    one = {"hidden_states": torch.zeros(2, 3), "img_ids": torch.ones(2, 3), "scale": {"x": 1.0}, "guidance": None}
    two = one | {"hidden_states": torch.ones(2, 3)}
    both = joined(one, two)
    assert torch.equal(both["hidden_states"], torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))
    assert (both["img_ids"] is one["img_ids"], both["scale"], both["guidance"]) == (True, {"x": 1.0}, None)
    for change in ({"scale": {"x": 2.0}}, {"guidance": torch.ones(2)}, {"img_ids": torch.zeros(2, 3)}):
        with pytest.raises(Uncached, match="makes no batch"):
            joined(one, two | change)


def test_a_bare_transformer_needs_the_scale():
    with pytest.raises(ValueError, match="called apart needs their guidance_scale"):
        enable(tiny("flux"), CacheConfig(num_steps=STEPS, guidance="separate"))
