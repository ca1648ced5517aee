"""A step in which no block runs, as one function of static shape.

Outside of its blocks the network embeds the state, norms and projects the tokens, and both are linear but for the norm.
What goes into them besides the state is known before the run starts: it depends on the step and the label. So a skipped
step and one that is taken again are, with P the patches of the state x and A_h what the stack is forecast to add to
guidance half h,

    eps = sum_h W_h (shift_h + scale_h norm(E P + positions + A_h))        x <- a x + b eps

where E is the embedding, W_h the final projection with guidance in it, and a, b the sampler's update. It is the same
result as that of the model's `forward`, guidance and sampler one after the other, which remain the definition, in a
fifth of the operations. It is computed in float32 where the model has 16 bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.gates import label_conditions, null_condition
from adacorr.run import take_rows


@dataclass(frozen=True)
class Update:
    """What a sampling loop does with the network's output, where it is linear.

    coefficients (S, 2): the state x becomes a x + b eps at each step. eps is the first channels of the output; under
    guidance its first `guided` channels are uncond + cfg_scale (cond - uncond), and those after them conditional ones.
    """

    coefficients: np.ndarray
    cfg_scale: float
    guided: int


class SkippedSteps:
    """Takes the steps of one run in which the blocks add what is known, for images with labels (n,) or None."""

    def __init__(self, model: nn.Module, labels: Tensor | None, images: int, timesteps: Tensor, update: Update):
        self.model, final = model, model.final_layer
        self.kind = torch.promote_types(final.linear.weight.dtype, torch.float32)
        halves, channels, device = 1 if update.cfg_scale == 1.0 else 2, model.in_channels, model.pos_embed.device
        projection = model.x_embedder.proj
        self.embedding = projection.weight.flatten(1).T.to(self.kind)  # (C * p * p, D)
        self.positions = (model.pos_embed + projection.bias).to(self.kind)  # (1, T, D)

        patch = model.patch_size**2
        weight, bias = (p.to(self.kind).unflatten(0, (patch, -1))[:, :channels] for p in final.linear.parameters())
        share = torch.ones(halves, channels, 1, device=device, dtype=self.kind)
        if halves == 2:
            share[0, : update.guided], share[1, : update.guided] = update.cfg_scale, 1.0 - update.cfg_scale
            share[1, update.guided :] = 0.0
        self.projection = (share[:, None] * weight).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (p * p * C, halves D)
        self.bias = bias.flatten()

        t = timesteps.to(device)
        conditions, self.rows = [null_condition(model, t)[None]], torch.zeros(images, halves, dtype=torch.long)
        if labels is not None:
            unique, index = torch.unique(labels, return_inverse=True)
            conditions.insert(0, label_conditions(model, t, unique))
            self.rows = torch.stack([index, torch.full_like(index, len(unique))][:halves], dim=1)
        shift, scale = final.modulation(torch.cat(conditions).transpose(0, 1).flatten(0, 1))
        table = torch.stack([shift.to(self.kind), 1 + scale.to(self.kind)], dim=1)
        self.modulation = table.unflatten(0, (len(t), -1))  # (S, labels, 2, D)
        self.rows = self.rows.to(device)
        self.update = torch.from_numpy(update.coefficients).to(device, self.kind)

    def walk(self, x: Tensor, start: int, added: Tensor, images: np.ndarray) -> Tensor:
        """The states (s, m, C, H, W) after each of s steps from `start` on, for `images` (m,) with the state x before.

        added (halves, m, s, T, D): what the stack adds in these steps.
        """
        steps = slice(start, start + added.shape[2])
        return self._walk(x, added, self._modulation(steps, images), self.update[steps])

    def output(self, x: Tensor, step: int, added: Tensor, images: np.ndarray) -> Tensor:
        """The guided noise (m, C, H, W) that is predicted at a step where the stack adds (halves, m, T, D)."""
        return self._predict(x.to(self.kind), added, self._modulation(slice(step, step + 1), images)[0]).to(x.dtype)

    def _modulation(self, steps: slice, images: np.ndarray) -> Tensor:
        """(s, m, halves, 2, D) shift and 1 + scale of the final layer."""
        rows = take_rows(self.rows, images)
        return self.modulation[steps].index_select(1, rows.flatten()).unflatten(1, rows.shape)

    def _walk(self, x: Tensor, added: Tensor, modulation: Tensor, update: Tensor) -> Tensor:
        states, now = [], x.to(self.kind)
        for i in range(len(update)):
            eps = self._predict(now, added[:, :, i], modulation[i])
            now = torch.addcmul(now * update[i, 0], eps, update[i, 1])
            states.append(now)
        return torch.stack(states).to(x.dtype)

    def _predict(self, x: Tensor, added: Tensor, modulation: Tensor) -> Tensor:
        """x (m, C, H, W), added (halves, m, T, D), modulation (m, halves, 2, D) -> guided noise (m, C, H, W)."""
        patches, halves = self.model.patches(x), len(added)
        weight = self.embedding.expand(len(x), -1, -1)
        tokens = torch.baddbmm(self.positions.expand(len(x), -1, -1), patches, weight)  # (m, T, D)
        h = tokens.new_empty(*tokens.shape[:2], halves, tokens.shape[2])
        torch.add(tokens.unsqueeze(2), added.permute(1, 2, 0, 3), out=h)  # (m, T, halves, D)
        shift, scale = modulation.unsqueeze(1).unbind(3)  # (m, 1, halves, D) each
        h = torch.addcmul(shift, self.model.final_layer.norm_final(h), scale)
        return self.model.unpatch(nn.functional.linear(h.flatten(2), self.projection, self.bias))
