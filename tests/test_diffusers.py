"""The cache on diffusers' transformers: exactness, resets, guidance layouts, hooks that come and go."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook
from tiny_diffusers import SCALE, STEPS, TINY, by_row, call, draw, guided, inputs, sample, tiny, toy_pipeline

from adacorr import available, compiled
from adacorr.integrations.diffusers import CacheConfig, enable
from adacorr.integrations.diffusers.families import FAMILIES
from adacorr.integrations.diffusers.schedule import TOLERANCE

families = pytest.mark.parametrize("name", TINY)
INTERVAL = {"adacorr": None, "cache": "interval:every=2,align=start"}


def config(**options):
    return CacheConfig(**{"num_steps": STEPS, **options})


def run(model, name, latents, other, **options):
    with enable(model, config(**options)) as cache:
        return sample(model, name, latents, other), cache.stats()


def traces(model):
    """Whatever a cache could leave behind on a module."""
    return [
        (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m._compiled_call_impl) for m in model.modules()
    ]


def test_every_family_is_tried():
    assert {kind for kind, *_ in TINY.values()} == set(FAMILIES)


@families
def test_what_is_computed_is_bit_equal_and_nothing_stays(name):
    model, (latents, other) = tiny(name), inputs(name, 2)
    before, plain = traces(model), sample(model, name, latents, other)
    for options in ({"adacorr": None, "cache": "never"}, {"adacorr": "gamma=1e6"}):
        cached, stats = run(model, name, latents, other, **options)
        assert torch.equal(cached, plain)
        assert stats["hit_rate"] == 0
        assert stats["bypassed"] == {}
    assert traces(model) == before
    assert torch.equal(sample(model, name, latents, other), plain)


@families
@pytest.mark.parametrize(
    "options", [INTERVAL, {"adacorr": "budget=3"}, {"adacorr": None, "cache": "first_block:threshold=9"}], ids=str
)
def test_cached_runs_leave_nothing_to_the_next_one_nor_to_other_images(name, options):
    model, (latents, other) = tiny(name), inputs(name, 3)
    plain = sample(model, name, latents, other)
    with enable(model, config(**options)) as cache:
        first = sample(model, name, latents, other)
        assert cache.stats()["compute"] < 0.95
        moved = sample(model, name, latents + 1, other)
        assert torch.equal(sample(model, name, latents, other), first)
        own = {key: value[2:] if by_row(key, value) else value for key, value in other.items()}
        alone = sample(model, name, latents[2:], own, STEPS)  # a smaller batch, then the first again
        assert torch.equal(sample(model, name, latents, other), first)
        assert cache.stats()["runs"] == 5
    assert first.isfinite().all()
    assert not torch.equal(first, plain)
    assert not torch.allclose(first, moved)
    torch.testing.assert_close(alone, first[2:], atol=1e-5, rtol=1e-4)


def gates_at(t, model, other):
    """The gate (2, D) of every branch of a DiT or a PixArt, in order."""
    t, blocks = torch.full((2,), t), model.transformer_blocks
    if "class_labels" in other:
        conditions = [(b.norm1, b.norm1.emb(t, other["class_labels"])) for b in blocks]
        return [gate for norm, c in conditions for gate in norm.linear(norm.silu(c)).chunk(6, dim=1)[2::3]]
    emb = model.adaln_single(t, other["added_cond_kwargs"], batch_size=2)[0].view(2, 6, -1)
    sixes = [(b.scale_shift_table + emb).unbind(1) for b in blocks]
    return [gate for six in sixes for gate in (six[2], torch.ones_like(six[2]), six[5])]


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "wan"])
def test_a_skipped_step_adds_old_branches_under_new_gates_where_there_are_gates(name):
    model, (latents, other), times = tiny(name), inputs(name, 2), (1000.0, 1000.0 * 5 / 6)
    parts = {"dit": ("attn1", "ff"), "pixart": ("attn1", "attn2", "ff")}.get(name, ())
    blocks = model.blocks if name == "wan" else model.transformer_blocks
    starts, ends, branches = [], [], []
    blocks[0].register_forward_pre_hook(
        lambda m, args, kw: starts.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    model.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    for block, part in product(blocks, parts):
        block.get_submodule(part).register_forward_hook(lambda m, args, out: branches.append(out))
    with torch.no_grad(), enable(model, config(**INTERVAL)):
        for t in times:
            call(model, name, latents, t, other)
    added = [end - start for start, end in zip(starts, ends, strict=True)]
    if not parts:
        torch.testing.assert_close(added[1], added[0])
        return
    old, new = (sum(g[:, None] * f for g, f in zip(gates_at(t, model, other), branches, strict=True)) for t in times)
    torch.testing.assert_close(added[0], old, atol=1e-4, rtol=1e-4)
    error = float((added[1] - new).norm() / new.norm())
    assert error < 0.03
    assert error < float((added[1] - old).norm() / old.norm()) / 3


# HunyuanVideo differs from Flux where some images compute and others do not.
BY_IMAGE = ("adacache", "dicache", "easycache", "first_block", "h2_cache", "precisecache", "rfc", "speca")
METHODS = [*product(("pixart", "flux"), available()), *product(("hunyuan",), BY_IMAGE)]


@pytest.mark.parametrize("adacorr", [None, "gamma=0.3"])
@pytest.mark.parametrize(("name", "policy"), METHODS)
def test_every_method_runs_or_says_why_not(name, policy, adacorr):
    model, (latents, other) = tiny(name), inputs(name, 2)
    refused = None
    try:
        images, stats = run(model, name, latents, other, adacorr=adacorr, cache=policy)
    except ValueError as error:
        refused = str(error)
    if refused is None:
        assert images.isfinite().all()
        assert stats["bypassed"] == {}
    else:
        assert policy in refused or "square grid" in refused
        assert adacorr is None or "square grid" not in refused  # where the tokens lie matters to what is reused alone


# --------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "cogvideox"])
@pytest.mark.parametrize("options", [INTERVAL, {"adacorr": "budget=3.5"}], ids=str)
def test_both_orders_of_the_halves_give_the_same_images(name, options):
    model, (latents, other) = tiny(name), inputs(name, 2)
    images = []
    for order in ("cond_first", "uncond_first"):
        with enable(model, config(guidance=order, guidance_scale=SCALE, **options)) as cache:
            images.append(guided(model, name, latents, other, order))
            trace = cache.stats()["trace"]
            assert (trace["halves"], trace["images"]) == (2, 2)
    torch.testing.assert_close(*images, atol=1e-6, rtol=1e-5)
    assert not torch.equal(images[0], guided(model, name, latents, other, "cond_first"))


def test_two_equal_halves_without_a_null_label_are_taken_image_by_image():
    model, (latents, other) = tiny("dit"), inputs("dit", 4)
    latents = latents[:2].repeat(2, 1, 1, 1)
    with enable(model, config(guidance_scale=SCALE, **INTERVAL)) as cache:
        images = sample(model, "dit", latents, other)
        assert cache.stats()["trace"]["images"] == 4
    assert torch.equal(images, run(model, "dit", latents, other, **INTERVAL)[0])


def test_a_bare_transformer_is_asked_anew_whether_its_rows_are_both_halves():
    model, (latents, other), two = tiny("sd3"), inputs("sd3", 1), inputs("sd3", 2)
    with enable(model, config(guidance_scale=SCALE, **INTERVAL)) as cache:
        guided(model, "sd3", latents, other, "uncond_first")
        assert cache.stats()["trace"]["halves"] == 2
        images = sample(model, "sd3", *two)
        assert cache.stats()["trace"]["images"] == 2
    assert torch.equal(images, run(model, "sd3", *two, **INTERVAL)[0])


# ----------------------------------------------------------------------------------------------------- resets


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("broken", [1, 2, 4])
def test_a_run_that_breaks_off_leaves_nothing(name, broken):
    model, (latents, other) = tiny(name), inputs(name, 2)

    left = iter(range(broken))

    def breaks(x, t):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(model, name, x, t, other)

    with enable(model, config(**INTERVAL)) as cache:
        expected = sample(model, name, latents, other)
        with pytest.raises(KeyboardInterrupt):
            sample(model, name, latents + 1, other, evaluate=breaks)
        assert torch.equal(sample(model, name, latents, other), expected)
        cache.reset()
        assert torch.equal(sample(model, name, latents, other), expected)


@pytest.mark.parametrize("where", ["transformer_blocks.1.attn1", "proj_out_1"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_model_ends_the_run(where, error):
    model, (latents, other) = tiny("dit"), inputs("dit", 2)

    def fail(module, args):
        raise error("out of memory")

    with enable(model, config(**INTERVAL)) as cache, torch.no_grad():
        expected = sample(model, "dit", latents, other)
        call(model, "dit", latents, 1000.0, other)
        call(model, "dit", latents, 1000.0 * 5 / 6, other)
        hook = model.get_submodule(where).register_forward_pre_hook(fail)
        with pytest.raises(error, match="out of memory"):
            call(model, "dit", latents, 1000.0 * 4 / 6, other)
        hook.remove()
        # Goes on as if nothing had been: the step begins a run, and nothing of the old one is in it.
        call(model, "dit", latents, 1000.0 * 3 / 6, other)
        assert cache.stats()["runs"] == 3
        assert cache.stats()["trace"]["executed_per_step"][0] == 1
        assert torch.equal(sample(model, "dit", latents, other), expected)


def test_dtype_and_timesteps_that_jump_begin_a_run():
    model, (latents, other) = tiny("sd3"), inputs("sd3", 2)
    grid = [1000.0, 800.0, 600.0, 400.0, 200.0]
    with torch.no_grad(), enable(model, CacheConfig(adacorr=None, cache="interval:every=9", timesteps=grid)) as cache:
        out = [call(model, "sd3", latents, t, other) for t in grid[:2]]
        assert cache.stats()["runs"] == 1
        assert torch.equal(call(model, "sd3", latents, 1000.0, other), out[0])  # up: a new run
        call(model, "sd3", latents, 600.0, other)  # a step left out: one more, from there to the end
        assert cache.stats()["runs"] == 3
        assert cache.stats()["trace"]["steps"] == 3
        call(model, "sd3", latents, 500.0, other)  # no step of the grid
        assert cache.stats()["bypassed"] == {"a timestep that is none of the scheduler's": 1}
        half = {k: v.bfloat16() for k, v in other.items()}
        model.bfloat16()
        assert call(model, "sd3", latents.bfloat16(), 400.0, half).dtype == torch.bfloat16
        assert cache.stats()["runs"] == 4


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("sd3", "block_controlnet_hidden_states", [torch.ones(2, 16, 24)]),
        ("sd3", "skip_layers", [1]),
        ("flux", "controlnet_block_samples", [torch.ones(2, 16, 32)]),
        ("flux", "joint_attention_kwargs", {"attention_mask": None}),
    ],
)
def test_calls_that_the_cache_does_not_know_run_as_they_are(name, argument, value):
    model, (latents, other) = tiny(name), inputs(name, 2)
    given = {**other, argument: value}
    with torch.no_grad():
        plain = call(model, name, latents, 1000.0, given)
    with enable(model, config(**INTERVAL)) as cache, torch.no_grad():
        expected = sample(model, name, latents, other)

        def evaluate(x, t):
            out = call(model, name, x, t, other)
            assert torch.equal(call(model, name, latents, 1000.0, given), plain)
            return out

        assert torch.equal(sample(model, name, latents, other, evaluate=evaluate), expected)
        assert cache.stats()["bypassed"] == {argument: STEPS}


# ------------------------------------------------------------------------------------------------ attach, detach


def test_a_failed_attach_leaves_nothing(monkeypatch):
    model, count = tiny("sd3"), []
    before, register = traces(model), HookRegistry.register_hook

    def fails(self, *args):
        count.append(args)
        if len(count) == 3:
            raise RuntimeError("no")
        return register(self, *args)

    monkeypatch.setattr(HookRegistry, "register_hook", fails)
    with pytest.raises(RuntimeError, match="no"):
        enable(model, config())
    assert len(count) == 3
    assert traces(model) == before


def with_attribute(name, attribute, value):
    model = tiny(name)
    setattr(model, attribute, value)
    return model


def with_other_cache():
    model = tiny("flux")
    model.enable_cache(FirstBlockCacheConfig())
    return model


def cached():
    model = tiny("dit")
    enable(model, config())
    return model


REFUSED = {
    "a linear layer is none": (lambda: torch.nn.Linear(2, 2), {}, ValueError, "Linear is no transformer that can be"),
    "compiled as a whole": (lambda: torch.compile(tiny("dit")), {}, ValueError, "give what it wraps, and compile=True"),
    "compiled by itself": (
        lambda: with_attribute("dit", "_compiled_call_impl", print),
        {},
        ValueError,
        r"by its compile\(\): compile its blocks",
    ),
    "several devices": (
        lambda: with_attribute("dit", "hf_device_map", {"pos_embed": 0, "transformer_blocks": 1}),
        {},
        ValueError,
        "lies on several devices",
    ),
    "twice": (cached, {}, RuntimeError, r"attached to this DiTTransformer2DModel already: disable\(\)"),
    "another cache": (with_other_cache, {}, RuntimeError, "another cache .* is on this FluxTransformer2DModel"),
    "parallel": (lambda: with_attribute("wan", "_parallel_config", 1), {}, ValueError, "context or tensor parallelism"),
    "no steps": (lambda: tiny("dit"), {"num_steps": None}, ValueError, "needs num_steps or timesteps"),
    "inside": (lambda: tiny("sd3"), {"adacorr": None, "cache": "toca"}, ValueError, "toca looks inside the layers"),
    "profile": (lambda: tiny("dit"), {"cache": "teacache"}, ValueError, "give its sha256 as model_id"),
    "output": (
        lambda: tiny("dit"),
        {"adacorr": None, "cache": "fastercache"},
        ValueError,
        "fastercache changes what the network gives",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        enable(make(), config(**options))


def test_pipelines_are_refused_for_what_they_have():
    first = SimpleNamespace(order=1, timesteps=[900, 500])
    pipe = SimpleNamespace(transformer=tiny("dit"), scheduler=first)
    with pytest.raises(ValueError, match="has no transformer_2"):
        enable(pipe, component="transformer_2")
    with pytest.raises(ValueError, match="the pipeline's scheduler has its own"):
        enable(pipe, config())
    pipe.scheduler = SimpleNamespace(order=2)
    with pytest.raises(ValueError, match="more than once in a step"):
        enable(pipe)


def test_disable_keeps_hooks_that_others_put_on_top():
    model, (latents, other) = tiny("flux"), inputs("flux", 1)
    plain = sample(model, "flux", latents, other)
    seen = []

    class Seen(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    cache, block = enable(model, config(**INTERVAL)), model.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Seen(), "seen")
    cache.disable()
    cache.disable()
    assert torch.equal(sample(model, "flux", latents, other), plain)
    assert len(seen) == STEPS


# ----------------------------------------------------------------------------------- what others do to the model


@pytest.mark.parametrize("how", ["config", "before", "after"])
def test_compiled_blocks(how, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model, (latents, other) = tiny("sd3"), inputs("sd3", 2)
    with enable(model, config(**INTERVAL)):
        expected = sample(model, "sd3", latents, other)
    if how == "before":
        for block in model.transformer_blocks:
            block.compile(backend="eager")
    before = traces(model)
    with enable(model, config(compile=how == "config", **INTERVAL)) as cache:
        if how == "after":
            for block in model.transformer_blocks:
                block.compile(backend="eager")
        torch.testing.assert_close(sample(model, "sd3", latents, other), expected)
        assert cache.stats()["hit_rate"] == 0.5
    if how != "after":
        assert traces(model) == before


def test_branches_of_compiled_blocks(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model, (latents, other) = tiny("dit"), inputs("dit", 2)
    plain, _ = run(model, "dit", latents, other, adacorr="budget=3")
    cached, _ = run(model, "dit", latents, other, adacorr="budget=3", compile=True)
    torch.testing.assert_close(cached, plain)


def test_lora():
    peft = pytest.importorskip("peft")
    model, (latents, other) = tiny("sd3"), inputs("sd3", 2)
    plain = sample(model, "sd3", latents, other)
    with enable(model, config(adacorr=None, cache="never")):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        with_lora = sample(model, "sd3", latents, other)
    assert not torch.equal(with_lora, plain)
    assert torch.equal(sample(model, "sd3", latents, other), with_lora)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="group offloading needs a GPU there")
@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_group_offloading_and_layerwise_casting(name):
    model, (latents, other) = tiny(name), inputs(name, 2)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    device = torch.device("cpu")
    model.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="block_level", num_blocks_per_group=1
    )
    plain = sample(model, name, latents, other)
    exact, _ = run(model, name, latents, other, adacorr="gamma=1e6")
    assert torch.equal(exact, plain)
    cached, stats = run(model, name, latents, other, **INTERVAL)
    assert cached.isfinite().all()
    assert stats["hit_rate"] == 0.5


# ------------------------------------------------------------------------------------------------ configuration


def test_configurations_are_saved_and_copied(tmp_path):
    made = CacheConfig(adacorr="gamma=2", cache="teacache:profile=none", dtype="bf16", timesteps=[900, 500.5])
    made.save(tmp_path / "cache.json")
    assert CacheConfig.load(tmp_path / "cache.json") == made == copy.deepcopy(made)
    assert CacheConfig.from_json(CacheConfig().to_json()) == CacheConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adacorr": None}, "give a policy|both None|needs a policy"),
        ({"adacorr": "gamma=-1"}, "gamma=-1"),
        ({"cache": "tea"}, "tea"),
        ({"dtype": "int4"}, "dtype='int4' must be one of fp32, bf16, fp16, int8"),
        ({"guidance": "both"}, "guidance='both' must be one of none, cond_first"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must lie in 0..100"),
        ({"num_steps": 0}, "num_steps=0 must lie in 1..1000"),
        ({"timesteps": [1, 2]}, "must fall from noise to image"),
        ({"timesteps": [2000]}, "within 0..1000"),
        ({"timesteps": [2, 1], "num_steps": 3}, "num_steps=3 contradicts 2 timesteps"),
    ],
    ids=str,
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no cache configuration in JSON"),
        ("[1]", "no cache configuration in JSON"),
        ('{"version": 7}', "of version 7; this one reads version 1"),
        ('{"version": 1, "gamma": 2}', "unexpected keyword argument 'gamma'"),
        ('{"version": 1, "num_steps": "9"}', "no cache configuration in JSON"),
        ('{"version": 1, "adacorr": 2}', "no cache configuration in JSON"),
        ('{"version": 1, "dtype": "int4"}', "dtype='int4' must be one of"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig.from_json(text)


def test_timesteps_that_pipelines_round_are_those_of_the_scheduler():
    """FLUX divides a timestep of the model's dtype by 1000, in that dtype, and the model takes it times 1000."""
    exact = torch.linspace(0, 1000, 4001, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = (exact.to(dtype) / 1000).double() * 1000
        assert (rounded - exact).abs().max() <= TOLERANCE
    pipe, given = toy_pipeline("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # in bf16 some of 100 steps have one timestep
    given = {key: value.bfloat16() if torch.is_tensor(value) else value for key, value in given.items()}
    with enable(pipe.to(torch.bfloat16), CacheConfig(adacorr="budget=9")) as cache:
        draw(pipe, given, num_inference_steps=100)
        assert (cache.stats()["runs"], cache.stats()["bypassed"]) == (1, {})
