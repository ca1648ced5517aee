"""What a sampling step does outside of the blocks, as one function of static shape with all that is known in tables.

Outside of its blocks the network embeds the state, norms and projects the tokens, and all of it is linear but for the
norm. What goes into it besides the state depends on the step and the label alone, so it is known before the run starts.
With P the patches of the state x and A_h what the stack adds to guidance half h, computed or forecast, a step is

    eps = sum_h W_h (shift_h + scale_h norm(E P + positions + A_h))        z <- A z + b eps

where E is the embedding, W_h the final projection with guidance in it, and z the state x with what the sampler
remembers, of which A and b make the next one. This is what the model's `forward`, guidance and the sampler give one
after the other, which remain the definition, in a quarter of the operations. A model of 16 bits is followed in float32
here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.gates import conditions, distinct
from adacorr.linear_steps import LinearSteps
from adacorr.run import take_rows
from adacorr.store import ComputedRows
from adacorr.transfer import on_device


@dataclass(frozen=True)
class Update:
    """What a sampling loop does with the network's output, where it is linear.

    steps: those of the sampler. Their eps is the first channels of the network's output; under guidance its first
    `guided` channels are uncond + cfg_scale (cond - uncond), and those after them conditional ones.
    """

    steps: LinearSteps
    cfg_scale: float
    guided: int


class Outside:
    """The tables of one run of n images with labels (n,), or None for an unconditional model, at timesteps (S,)."""

    def __init__(self, model: nn.Module, labels: Tensor | None, images: int, timesteps: Tensor, update: Update):
        self.model, final, projection = model, model.final_layer, model.x_embedder.proj
        halves, channels, device = 1 if update.cfg_scale == 1.0 else 2, model.in_channels, model.pos_embed.device
        self.dtype = torch.promote_types(model.pos_embed.dtype, torch.float32)
        self._embedding = projection.weight.flatten(1).T.to(self.dtype)  # (C * p * p, D)
        self._positions = model.pos_embed.to(self.dtype) + projection.bias  # (1, T, D)

        patch, share = model.patch_size**2, torch.ones(halves, channels, dtype=self.dtype, device=device)
        if halves == 2:
            share[0, : update.guided] = update.cfg_scale
            share[1] = 1.0 - share[0]
        weight, bias = (p.to(self.dtype).unflatten(0, (patch, -1))[:, :channels] for p in final.linear.parameters())
        weight = share[:, None, :, None] * weight  # (halves, p * p, C, D)
        self._projection = weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (p * p * C, halves * D)
        self._bias = bias.flatten()

        t, label = on_device(timesteps, device), np.zeros(images, dtype=np.int64)
        if labels is not None:
            labels, label = distinct(labels, device)
        known = torch.cat(conditions(model, t, labels, halves))  # the null label last
        self._labels = np.stack([label, np.full_like(label, len(known) - 1)][:halves])  # (halves, n)
        self._conditions = known.transpose(0, 1)  # (S, labels, D)
        shift, scale = final.modulation(self._conditions)
        self._modulation = torch.stack([shift.to(self.dtype), 1 + scale.to(self.dtype)], dim=2)  # (S, labels, 2, D)
        coefficients = np.concatenate([update.steps.carry, update.steps.gain[..., None]], axis=2)
        self._update = on_device(coefficients, device, self.dtype)  # (S, K, K + 1)

    def enter(self, z: Tensor, step: int, computed: ComputedRows) -> tuple[Tensor, Tensor]:
        """What the blocks take for the rows [cond; uncond] of the state z (n, K * C, H, W): tokens, conditioning."""
        x = z[:, : self.model.in_channels].to(self.dtype)
        tokens = embed(self.model, x, self._positions, self._embedding).to(self._conditions.dtype)
        rows = [take_rows(tokens, own) for own in computed.halves]
        label = np.concatenate([own[images] for own, images in zip(self._labels, computed.halves, strict=False)])
        c = self._conditions[step].index_select(0, on_device(label, x.device))
        return torch.cat(rows) if len(computed.uncond) else rows[0], c

    def walk(self, z: Tensor, start: int, added: Tensor, images: np.ndarray) -> Tensor:
        """The states (s, m, K * C, H, W) after each of s steps from `start` on, for `images` (m,) with z before them.

        added (halves, m, s, T, D): what the stack adds in these steps.
        """
        steps, label = slice(start, start + added.shape[2]), on_device(self._labels[:, images].T, z.device)
        modulation = self._modulation[steps].index_select(1, label.flatten()).unflatten(1, label.shape)
        weights = self._positions, self._embedding, self._projection, self._bias
        inputs = self.model, z.to(self.dtype), added, modulation, self._update[steps], *weights
        whole, captured = len(images) == self._labels.shape[1], self.model.captured
        return (walk(*inputs) if captured is None or not whole else captured(walk, *inputs)).to(z.dtype)


def walk(
    model: nn.Module,
    z: Tensor,
    added: Tensor,
    modulation: Tensor,
    update: Tensor,
    positions: Tensor,
    embedding: Tensor,
    projection: Tensor,
    bias: Tensor,
) -> Tensor:
    """The states (s, m, K * C, H, W) after each of s steps. No value is looked at, so that it can be captured.

    z (m, K * C, H, W), added (halves, m, s, T, D), modulation (s, m, halves, 2, D) shift and 1 + scale, update (s, K,
    K + 1) the coefficients of the state's parts and of eps; positions (1, T, D), embedding (C * p * p, D), projection
    (p * p * C, halves * D), bias (p * p * C,).
    """
    states = []
    for i in range(len(update)):
        tokens = embed(model, z[:, : model.in_channels], positions, embedding)  # (m, T, D)
        h = tokens.new_empty(*tokens.shape[:2], len(added), tokens.shape[2])
        torch.add(tokens.unsqueeze(2), added[:, :, i].permute(1, 2, 0, 3), out=h)  # (m, T, halves, D)
        shift, scale = modulation[i].unsqueeze(1).unbind(3)  # (m, 1, halves, D) each
        h = torch.addcmul(shift, model.final_layer.norm_final(h), scale)
        eps = model.unpatch(nn.functional.linear(h.flatten(2), projection, bias))  # (m, C, H, W)
        carry, gain = update[i].split([update.shape[1], 1], dim=1)
        parts = z.reshape(len(z), update.shape[1], -1)
        # No matrix product: TF32 would round the state.
        carried = carry * parts if len(carry) == 1 else (carry[:, :, None] * parts[:, None]).sum(dim=2)
        z = torch.addcmul(carried, eps.flatten(1).unsqueeze(1), gain).view(z.shape)
        states.append(z)
    return torch.stack(states) if len(states) > 1 else z[None]


def embed(model: nn.Module, x: Tensor, positions: Tensor, embedding: Tensor) -> Tensor:
    """x (m, C, H, W) -> tokens with positions (m, T, D)."""
    positions, embedding = (part.expand(len(x), -1, -1) for part in (positions, embedding))
    return torch.baddbmm(positions, model.patches(x), embedding)
