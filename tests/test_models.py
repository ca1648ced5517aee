"""The network: names and shapes of the release, formulas by hand, guidance, the pieces that caches use."""

import math
from functools import partial, reduce

import pytest
import torch

import models
from models import DiT, DiT_models, DiTBlock, guide, sincos_pos_embed, timestep_features


def randomised(model, std=0.1):
    """A model with no part zero: straight from its constructor an adaLN-Zero model predicts nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


tiny = partial(DiT, input_size=8, patch_size=2, hidden_size=24, depth=2, num_heads=3, num_classes=5)


def inputs(rows=2):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    return x, *(torch.randint(0, bound, (rows,), generator=generator) for bound in (1000, 5))


def released_shapes(width, depth, patch, channels, out_channels, tokens, rows):
    """What the released state dicts hold, written down from the files and not from models.py."""
    layers = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * out_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "x_embedder.proj": (width, channels, patch, patch),
    }
    for i in range(depth):
        layers[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        layers[f"blocks.{i}.attn.proj"] = (width, width)
        layers[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        layers[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        layers[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    shapes = {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (rows, width)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


@pytest.mark.parametrize(("input_size", "tokens"), [(32, 256), (64, 1024)])
def test_xl_2_has_the_released_names_and_shapes(input_size, tokens):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=input_size)
    expected = released_shapes(1152, 28, 2, 4, 8, tokens, 1001)
    assert shapes_of(model) == expected
    assert len(expected) == 12 + 28 * 10
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_the_pixel_model_has_no_sigma_and_the_unconditional_one_no_table():
    with torch.device("meta"):
        model = DiT_models["DiT-Ti/4"](in_channels=3, num_classes=0, learn_sigma=False)
    expected = released_shapes(192, 12, 4, 3, 3, 64, 1)
    del expected["y_embedder.embedding_table.weight"]
    assert shapes_of(model) == expected


def test_table_has_a_null_row_exactly_when_labels_are_dropped():
    dropped, kept = tiny(class_dropout_prob=0.1), tiny(class_dropout_prob=0.0)
    assert [model.y_embedder.embedding_table.num_embeddings for model in (dropped, kept)] == [6, 5]
    assert dropped.null_label == 5
    for model in (kept, tiny(num_classes=0)):
        with pytest.raises(ValueError, match="no null label"):
            _ = model.null_label


def test_the_named_sizes():
    published = dict(XL=(28, 1152, 16), L=(24, 1024, 16), B=(12, 768, 12), S=(12, 384, 6), Ti=(12, 192, 3))
    assert set(DiT_models) == {f"DiT-{size}/{p}" for size in published for p in (2, 4, 8)}
    for name, build in DiT_models.items():
        size, patch = name[4:].split("/")
        with torch.device("meta"):
            config = build().config
        found = config["depth"], config["hidden_size"], config["num_heads"], config["patch_size"]
        assert found == (*published[size], int(patch))


def test_config_rebuilds_the_model():
    model = tiny(mlp_ratio=2.0, learn_sigma=False, class_dropout_prob=0.2)
    assert shapes_of(DiT(**model.config)) == shapes_of(model)
    assert model.blocks[0].mlp.fc1.out_features == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 9}, "input_size 9 must be a multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size 24 must be a multiple of num_heads 5"),
        ({"hidden_size": 6}, "width 6 is not a multiple of 4"),
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"num_classes": -1}, "num_classes -1 must be at least 0"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob 1.5 must lie in \[0, 1\]"),
    ],
)
def test_sizes_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_cache_shows_on_three_lines_of_models_py_at_most():
    with open(models.__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) <= 375
    assert sum("cache" in line.lower() for line in lines) <= 3


def test_timestep_features_by_hand():
    features = timestep_features(torch.tensor([0, 7, 999]))
    assert features.shape == (3, 256)
    assert features[0].tolist() == [1.0] * 128 + [0.0] * 128  # cosines first
    for k in (0, 1, 64, 127):
        angle = 7 * math.exp(-math.log(10000) * k / 128)  # over 128 intervals, not 127
        assert features[1, k].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert features[1, 128 + k].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_timestep_features_stay_float32_for_low_precision_timesteps():
    # bf16 itself has no 999; the features of an exact 998 must not be computed in bf16 either.
    assert timestep_features(torch.tensor([998])).dtype == torch.float32
    model = tiny().bfloat16()
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.t_embedder(torch.tensor([999]))
    assert torch.equal(seen[0], timestep_features(torch.tensor([999])).bfloat16())


def test_positions_by_hand():
    positions = sincos_pos_embed(8, 3)
    assert positions.shape == (1, 9, 8)
    row, column = 2, 1
    expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
    assert positions[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_block_by_hand():
    torch.manual_seed(0)
    block = randomised(DiTBlock(8, 2), std=0.5)
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def linear(v, layer):
        return v @ layer.weight.T + layer.bias

    shift1, scale1, gate1, shift2, scale2, gate2 = (
        p[:, None] for p in linear(c * c.sigmoid(), block.adaLN_modulation[1]).split(8, dim=1)
    )
    h = linear(norm(x) * (1 + scale1) + shift1, block.attn.qkv)
    heads = []
    for j in range(2):
        q, k, v = (h[..., 8 * part + 4 * j : 8 * part + 4 * j + 4] for part in range(3))
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    attn = linear(torch.cat(heads, dim=-1), block.attn.proj)
    middle = x + gate1 * attn
    h = linear(norm(middle) * (1 + scale2) + shift2, block.mlp.fc1)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    mlp = linear(h, block.mlp.fc2)

    taps = []
    out = block(x, c, tap=lambda *branches: taps.extend(branches))
    torch.testing.assert_close((out, *taps), (middle + gate2 * mlp, attn, mlp), rtol=1e-4, atol=1e-5)
    assert torch.equal(out, block(x, c))


def test_condition_is_the_sum_of_both_embeddings():
    model = randomised(tiny())
    _, t, y = inputs()
    torch.testing.assert_close(model.condition(t, y), model.t_embedder(t) + model.y_embedder.embedding_table.weight[y])


def test_decode_puts_every_patch_back_where_embed_took_it_from():
    model = randomised(tiny(in_channels=3, learn_sigma=False))
    with torch.no_grad():  # every token decodes to the same patch, in which all values differ
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(torch.arange(12.0))
    out = model.decode(torch.zeros(1, 16, 24), torch.zeros(1, 24))[0]
    for c, row, column in ((0, 0, 0), (2, 0, 1), (1, 5, 4), (2, 7, 7)):
        assert out[c, row, column] == (row % 2 * 2 + column % 2) * 3 + c

    # Changing one pixel changes one token, the one that decode writes to the same position.
    bumped = torch.zeros(2, 3, 8, 8)
    bumped[0, 1, 5, 2] = 1
    changed = model.embed(bumped).diff(dim=0).abs().sum(-1)[0].nonzero().flatten()
    assert changed.tolist() == [2 * 4 + 1]
    randomised(model)
    tokens, c = torch.randn(1, 16, 24), torch.randn(1, 24)
    other = tokens.clone()
    other[0, 9] += torch.randn(24)
    touched = (model.decode(other, c) - model.decode(tokens, c)).abs().sum((0, 1)).nonzero()
    assert sorted(map(tuple, touched.tolist())) == [(4, 2), (4, 3), (5, 2), (5, 3)]


def test_a_new_model_predicts_zero_and_its_blocks_are_identities():
    model = tiny().eval()
    x, t, y = inputs()
    assert model(x, t, y).abs().max() == 0
    tokens, c = model.embed(x), model.condition(t, y)
    assert torch.equal(model.blocks[1](tokens, c), tokens)
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert model.x_embedder.proj.weight.abs().max() <= math.sqrt(6 / (24 + 16))  # fans of the flat patch
    big = DiT_models["DiT-S/8"](depth=1)
    for weight in (big.t_embedder.mlp[0].weight, big.t_embedder.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert big.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_labels_are_dropped_while_training_only():
    torch.manual_seed(0)
    embedder = randomised(tiny(class_dropout_prob=0.25)).y_embedder
    labels = torch.full((4000,), 3)
    null = embedder.embedding_table.weight[5]
    assert torch.equal(embedder.eval()(labels), embedder.embedding_table.weight[labels])
    dropped = (embedder.train()(labels) == null).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert labels.eq(3).all()


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_outputs_have_the_right_channels(learn_sigma, num_classes):
    model = randomised(tiny(learn_sigma=learn_sigma, num_classes=num_classes))
    x, t, y = inputs()
    out = model(x, t, y if num_classes else None)
    assert out.shape == (2, 8 if learn_sigma else 4, 8, 8)
    assert out.abs().max() > 0


def test_inputs_that_do_not_fit_are_refused():
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"input \(2, 4, 8, 6\) does not fit the model, which takes \(N, 4, 8, 8\)"):
        tiny()(x[..., :6], t, y)
    with pytest.raises(ValueError, match="labels are missing, but num_classes is 5"):
        tiny()(x, t)
    with pytest.raises(ValueError, match="labels are given, but num_classes is 0"):
        tiny(num_classes=0)(x, t, y)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_follows_float32(dtype, tolerance):
    model = randomised(tiny())
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert ((out.float() - expected).norm() / expected.norm()).item() < tolerance


def test_a_manager_takes_over_the_blocks_and_nothing_else():
    class Manager:
        def run_blocks(self, blocks, x, c):
            self.seen = (blocks, x, c)
            return reduce(lambda tokens, block: block(tokens, c), blocks, x)

    model = randomised(tiny())
    x, t, y = inputs()
    expected = model(x, t, y)
    assert model.cache is None
    model.cache = manager = Manager()
    assert torch.equal(model(x, t, y), expected)
    blocks, tokens, c = manager.seen
    assert blocks is model.blocks
    assert torch.equal(tokens, model.embed(x))
    assert torch.equal(c, model.condition(t, y))
    model.cache = None
    assert torch.equal(model(x, t, y), expected)


def test_guidance_arithmetic():
    # One pixel, four noise channels and four of sigma; conditional row first.
    out = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0.0, 1, 1, 1, 50, 60, 70, 80]]).reshape(2, 8, 1, 1)
    for channels, fourth in ((3, 4.0), ("3", 4.0), ("all", 5.5)):
        assert guide(out, 1.5, 4, channels).flatten().tolist() == [1.5, 2.5, 4.0, fourth, 5, 6, 7, 8]
    assert torch.equal(guide(out, 1.0, 4, "all"), out[:1])


@pytest.mark.parametrize(
    ("rows", "noise", "channels", "message"),
    [(2, 4, channels, "is neither 3 .* nor 'all'") for channels in (2, 4, True, None, "none", -3)]
    + [(2, 1, 3, "exceeds the 1 noise channels"), (3, 4, "all", "got 3 rows")],
)
def test_guidance_refuses_what_it_cannot_do(rows, noise, channels, message):
    with pytest.raises(ValueError, match=message):
        guide(torch.zeros(rows, 2 * noise, 1, 1), 1.5, noise, channels)


@pytest.mark.parametrize("channels", [3, "all"])
def test_forward_with_cfg_guides_both_halves(channels):
    model, calls = randomised(tiny()), []
    model.register_forward_hook(lambda *_: calls.append(1))  # hooks fire: it goes through __call__
    x, t, y = inputs(rows=4)
    t[2:] = t[:2]
    y[2:] = model.null_label
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, 4.0, channels)  # the second half of x is other noise
        assert calls == [1]
        cond, null = model(x[:2], t[:2], y[:2]), model(x[:2], t[:2], y[2:])
    k = 3 if channels == 3 else 4
    guided = null[:, :k] + 4.0 * (cond[:, :k] - null[:, :k])
    expected = torch.cat([torch.cat([guided, half[:, k:]], 1) for half in (cond, null)])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_flops_of_xl_2_at_256_px():
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"]()
    attn, mlp = model.branch_flops()
    assert attn == 2 * (256 * 4 * 1152**2 + 2 * 256**2 * 1152 + 3 * 1152**2)  # qkv, proj; attention; half of adaLN
    assert mlp == 2 * (256 * 8 * 1152**2 + 3 * 1152**2)
    assert 28 * (attn + mlp) / 2e9 == pytest.approx(118.6, abs=0.05)  # GMAC, the published count
    assert model.gate_flops() == 2 * (2 * 1152) * 1152


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = randomised(tiny(mlp_ratio=3.0))
    x, t, y = inputs(rows=1)
    c, tokens = model.condition(t, y), model.embed(x)
    model.blocks[0].attn.fused_attn = False  # the counter does not see into every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.blocks[0](tokens, c)
    assert sum(model.branch_flops()) == counter.get_total_flops()
