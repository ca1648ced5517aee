"""Diffusion transformers (DiT) on timm's PatchEmbed, Attention and Mlp.

Architecture: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. Parameter
names and shapes are those of the released DiT weights, so a released state dict loads strictly.

Shapes: N rows, C channels, H x W input size, p patch size, T = (H / p) * (W / p) tokens, D hidden width.
"""
import math
from functools import partial

import torch
import torch.nn as nn
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention


def modulate(x, shift, scale):
    """Affine part of adaptive layer norm: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_features(t, dim=256, max_period=10000):
    """Sinusoids of (possibly fractional) timesteps: t (N,) -> (N, dim) float32, cosines before sines.

    Frequency k of dim / 2 is max_period ** (-2 k / dim) (Vaswani et al., arXiv 1706.03762). Always float32:
    bf16 cannot tell timestep 998 from 999. Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"timestep feature width {dim} must be even: half cosines, half sines")
    k = torch.arange(dim // 2, dtype=torch.float32, device=t.device)  # (dim / 2,)
    frequencies = torch.exp(-math.log(max_period) * k / (dim // 2))   # (dim / 2,)
    angles = t.float().unsqueeze(1) * frequencies                     # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)             # (N, dim)


class TimestepEmbedder(nn.Module):
    """Two-layer MLP over the sinusoidal features: t (N,) -> (N, D) in the dtype of the weights."""

    def __init__(self, hidden_size, feature_size=256):
        super().__init__()
        self.feature_size = feature_size
        self.mlp = nn.Sequential(nn.Linear(feature_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        features = timestep_features(t, self.feature_size)       # (N, 256) float32
        return self.mlp(features.to(self.mlp[0].weight.dtype))   # (N, D)


class LabelEmbedder(nn.Module):
    """Class table: labels (N,) int64 -> (N, D); with dropout one row more, for the null label `num_classes`.

    In training mode each label turns into the null label with probability `dropout_prob`, which teaches the
    model its unconditional branch (Ho and Salimans, arXiv 2207.12598).
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob  # (N,)
            labels = labels.masked_fill(dropped, self.num_classes)                        # (N,)
        return self.embedding_table(labels)                                               # (N, D)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each with adaLN-Zero: shifted and scaled before, gated after, all three from c."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def modulation(self, c):
        """c (N, D) -> six (N, D): shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp."""
        return self.adaLN_modulation(c).chunk(6, dim=1)

    def gates(self, c):
        """The two gates of `modulation` alone, a third of its work: c (N, D) -> gate_msa, gate_mlp, (N, D) each."""
        linear, silu = self.adaLN_modulation[1], self.adaLN_modulation[0]
        weight, bias = (torch.cat(p.chunk(6)[2::3]) for p in (linear.weight, linear.bias))
        return nn.functional.linear(silu(c), weight, bias).chunk(2, dim=1)

    def attn_branch(self, x, shift, scale):
        """Attention branch before its gate: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
        return self.attn(modulate(self.norm1(x), shift, scale))

    def mlp_branch(self, x, shift, scale):
        """MLP branch before its gate: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
        return self.mlp(modulate(self.norm2(x), shift, scale))

    def forward(self, x, c, tap=None):
        """x (N, T, D), c (N, D) -> (N, T, D); `tap(attn, mlp)`, if given, gets the two pre-gate outputs."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)  # 6 x (N, D)
        attn = self.attn_branch(x, shift_msa, scale_msa)                                     # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * attn                                                 # (N, T, D)
        mlp = self.mlp_branch(x, shift_mlp, scale_mlp)                                       # (N, T, D)
        x = x + gate_mlp.unsqueeze(1) * mlp                                                  # (N, T, D)
        if tap is not None:
            tap(attn, mlp)
        return x


class FinalLayer(nn.Module):
    """Modulated norm and the projection to pixels: x (N, T, D), c (N, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulation(self, c):
        """c (..., D) -> shift, scale, (..., D) each."""
        return self.adaLN_modulation(c).chunk(2, dim=-1)

    def forward(self, x, c):
        shift, scale = self.modulation(c)                        # 2 x (N, D)
        x = modulate(self.norm_final(x), shift, scale)           # (N, T, D)
        return self.linear(x)                                    # (N, T, p * p * out_channels)


def run_blocks(blocks, x, c):
    """x (N, T, D) through all blocks under c (N, D) -> (N, T, D)."""
    for block in blocks:
        x = block(x, c)                                          # (N, T, D)
    return x


class DiT(nn.Module):
    """Class-conditional diffusion transformer: x (N, C, H, W), t (N,), y (N,) -> (N, C or 2C, H, W).

    It predicts the noise and, with `learn_sigma`, as many variance channels. `num_classes=0` builds an unconditional
    model without a label table. `config` holds the constructor's arguments, ready for JSON. Raises ValueError for
    sizes that do not divide and for values out of range. Source: arXiv 2212.09748, section 3.2 (adaLN-Zero).
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_config(self.config)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter because released state dicts list it, fixed because it is computed and never trained.
        positions = sincos_pos_embed(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.cache = None  # an adacorr.run.CachedRun, while one is open
        self.captured = None  # an adacorr.captured.Captured, once the model is compiled
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise as in the paper: every block starts as the identity, and the model predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch projection is a linear map of flat patches; the 4-D kernel would give xavier another fan.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.num_classes > 0:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def null_label(self):
        """Label of the unconditional branch, `num_classes`; ValueError for a model that never learnt one."""
        if self.num_classes == 0 or self.config["class_dropout_prob"] == 0:
            raise ValueError(f"no null label: num_classes is {self.num_classes} and class_dropout_prob "
                             f"{self.config['class_dropout_prob']}, so sample without guidance, by --cfg-scale 1")
        return self.num_classes

    @property
    def stream(self):
        """What passes through the blocks: tokens T, width D and the device."""
        return self.pos_embed.shape[1], self.hidden_size, self.pos_embed.device

    def patches(self, x):
        """x (N, C, H, W) -> flat patches (N, T, C * p * p), as `embed` projects them."""
        p = self.patch_size
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))            # (N, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, T, C * p * p)

    def unpatch(self, x):
        """x (N, T, p * p * channels), as the final layer gives it, for any channels -> (N, channels, H, W)."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.reshape(len(x), grid, grid, p, p, -1)         # (N, H/p, W/p, p, p, channels)
        x = x.permute(0, 5, 1, 3, 2, 4)                     # (N, channels, H/p, p, W/p, p)
        return x.reshape(*x.shape[:2], grid * p, grid * p)  # (N, channels, H, W)

    def embed(self, x):
        """x (N, C, H, W) -> tokens with positions (N, T, D). Raises ValueError for another shape of input."""
        size, projection = self.input_size, self.x_embedder.proj
        if x.shape[1:] != (self.in_channels, size, size):
            raise ValueError(f"input {tuple(x.shape)} does not fit the model, which takes "
                             f"(N, {self.in_channels}, {size}, {size})")
        # One matrix product over flat patches: x_embedder's strided convolution is several times slower on a CPU and
        # leaves the tokens transposed in memory, which would slow every block.
        x = self.patches(x)                                       # (N, T, C * p * p)
        return nn.functional.linear(x, projection.weight.flatten(1), projection.bias) + self.pos_embed

    def condition(self, t, y=None):
        """t (N,) or (1,) for all rows, y (N,) int64 or None for an unconditional model -> c (N, D).

        Raises ValueError if labels are missing or superfluous. The caller checks their range, on the CPU: a look at
        the values here would stall the device at every step.
        """
        if (y is None) != (self.num_classes == 0):
            raise ValueError(f"labels are {'missing' if y is None else 'given'}, but num_classes is "
                             f"{self.num_classes}: pass y exactly when num_classes > 0")
        c = self.t_embedder(t)                                    # (N, D)
        return c if y is None else c + self.y_embedder(y)         # (N, D)

    def decode(self, tokens, c):
        """tokens (N, T, D), c (N, D) -> (N, out_channels, H, W)."""
        return self.unpatch(self.final_layer(tokens, c))          # (N, out_channels, H, W)

    def forward(self, x, t, y=None):
        """x (N, C, H, W), t (N,), y (N,) or None -> (N, out_channels, H, W): noise, then sigma if learnt.

        x may have N / 2 rows, which then stand for both guidance halves and are embedded once.
        """
        c = self.condition(t, y)                                  # (N, D)
        x = self.embed(x)                                         # (N, T, D)
        if 2 * len(x) == len(c):
            x = torch.cat([x, x])                                 # (N, T, D)
        if self.cache is not None:
            x = self.cache.run_blocks(self.blocks, x, c)          # (N, T, D)
        elif self.captured is not None:
            x = self.captured(run_blocks, self.blocks, x, c)      # (N, T, D)
        else:
            x = run_blocks(self.blocks, x, c)                     # (N, T, D)
        return self.decode(x, c)                                  # (N, out_channels, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """`guide` in one stacked call: the release's interface, for code that was written against it.

        x (2N, C, H, W), t (2N,), y (2N,) = [labels; null labels] -> (2N, out_channels, H, W), guided in both halves.
        Only the first half of x is read and stands for both.
        """
        k = guided_channels(cfg_channels, self.in_channels, len(x))    # complain before the work, not after it
        out = self(x[: len(x) // 2], t, y)                             # (2N, out_channels, H, W)
        first = guide(out, cfg_scale, self.in_channels, cfg_channels)  # (N, out_channels, H, W)
        second = torch.cat([first[:, :k], out[len(first):, k:]], dim=1)
        return torch.cat([first, second])

    def branch_flops(self):
        """FLOPs (2 per multiply-add) of one block's matrix products for a row: (attention, MLP), half of adaLN each."""
        tokens, width, hidden = self.pos_embed.shape[1], self.hidden_size, self.blocks[0].mlp.fc1.out_features
        modulation = 2 * 3 * width * width
        attn = 2 * (4 * tokens * width * width + 2 * tokens * tokens * width)  # qkv + proj; scores, weighted values
        mlp = 2 * 2 * tokens * width * hidden                                  # fc1 + fc2
        return attn + modulation, mlp + modulation

    def gate_flops(self):
        """FLOPs per row of only the two gates of one block, two of the six outputs of its adaLN linear."""
        return 2 * 2 * self.hidden_size * self.hidden_size


def guided_channels(cfg_channels, num_noise_channels, rows):
    """How many leading channels are guided: 3 for 3 or "3", all noise channels for "all"; else ValueError."""
    if rows % 2:
        raise ValueError(f"guidance needs a conditional and a null half of equal size, got {rows} rows")
    if cfg_channels == "all":
        return num_noise_channels
    if cfg_channels not in (3, "3"):
        raise ValueError(f"cfg_channels {cfg_channels!r} is neither 3 (as in the release) nor 'all'")
    if num_noise_channels < 3:
        raise ValueError(f"cfg_channels 3 exceeds the {num_noise_channels} noise channels here: use 'all'")
    return 3


def guide(out, cfg_scale, num_noise_channels, cfg_channels=3):
    """uncond + cfg_scale * (cond - uncond), all that a sampler goes on with: out (2N, C, H, W) -> (N, C, H, W).

    The first half of `out` is conditional. Only guided channels change; every other channel, sigma always, keeps the
    conditional value. The release guides 3 of its 4 noise channels, and its published scores were computed so. Raises
    ValueError for another `cfg_channels` and an odd batch. Source: arXiv 2207.12598, eq. 6 with w = cfg_scale - 1.
    """
    channels = guided_channels(cfg_channels, num_noise_channels, len(out))
    cond, uncond = out.chunk(2)                                   # 2 x (N, C, H, W)
    guided = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1) if channels < out.shape[1] else guided


# --------------------------------------------------------------------------------- Positions and argument checks

def sincos_pos_embed(width, grid):
    """Fixed sine-cosine positions of a grid x grid image -> (1, grid * grid, width) float32, row by row.

    The first half of the width encodes the column and the second the row, each as sines and then cosines at frequencies
    10000 ** (-4 k / width), in float64 (arXiv 2111.06377). Raises ValueError for a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, as sines and cosines of two axes need")
    position = torch.arange(grid, dtype=torch.float64)                  # (grid,)
    k = torch.arange(width // 4, dtype=torch.float64)                   # (width / 4,)
    angles = position.unsqueeze(1) * 10000 ** (-4 * k / width)          # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)               # (grid, width / 2)
    columns = axis.unsqueeze(0).expand(grid, grid, -1)                  # (row, column, width / 2)
    rows = axis.unsqueeze(1).expand(grid, grid, -1)                     # (row, column, width / 2)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def check_config(config):
    """Raise ValueError for a constructor argument of `DiT` that cannot work, naming value and range."""
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
        if config[name] < 1:
            raise ValueError(f"{name} {config[name]} must be at least 1")
    for name, divisor in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
        if config[name] % config[divisor]:
            raise ValueError(f"{name} {config[name]} must be a multiple of {divisor} {config[divisor]}")
    if config["num_classes"] < 0:
        raise ValueError(f"num_classes {config['num_classes']} must be at least 0 (0 is unconditional)")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(f"class_dropout_prob {config['class_dropout_prob']} must lie in [0, 1]")


# Table 1 of arXiv 2212.09748; Ti is ours, the size of the bundled model.
SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "Ti": {"depth": 12, "hidden_size": 192, "num_heads": 3},
}

DiT_models = {
    f"DiT-{size}/{patch_size}": partial(DiT, patch_size=patch_size, **shape)
    for size, shape in SIZES.items() for patch_size in (2, 4, 8)
}
