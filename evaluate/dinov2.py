"""DINOv2 (arXiv 2304.07193) as a second representation, for FD-DINOv2 (Stein et al., arXiv 2306.04675)."""

from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from checkpoint import load_checkpoint
from evaluate.networks import Features
from fid_run.protocol import digest

MODEL = "vit_large_patch14_dinov2.lvd142m"
SIZE = 224  # pixels on each side of the input
PATCH = 14
OFFSET = 0.1  # tokens by which DINOv2's own code enlarges the grid of positions before it interpolates
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def positions(stored: Tensor) -> Tensor:
    """Position embeddings (1, 1 + G * G, D) of the trained grid -> (1, 1 + 256, D), as DINOv2's code resamples them."""
    first, grid = stored[:, :1], stored[:, 1:]
    side, tokens = round(grid.shape[1] ** 0.5), SIZE // PATCH
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    scale = (tokens + OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def prepared(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> float32 (n, 3, SIZE, SIZE), resized by Pillow and normalised."""
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), bicubic)) for image in images.cpu().numpy()]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class DinoV2:
    """The network as `evaluate.networks` wants it.

    weights: a local file with timm's names; without one timm downloads them from its hub. `model`: its name in timm.
    ValueError for an unknown model, and for weights that are not there or are of another network.
    """

    name, convention = "dinov2", f"Pillow bicubic to {SIZE} px, ImageNet mean and deviation, class token, float32"

    def __init__(self, weights: Path | None, device: torch.device | str, offline: bool, model: str):
        if offline and weights is None:
            raise ValueError(f"--offline forbids fetching {model}: give its file with --weights")
        try:
            net = timm.create_model(model, pretrained=weights is None, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"--features dinov2: timm cannot make {model}: {error}") from error
        if not isinstance(getattr(net, "pos_embed", None), Tensor):
            raise ValueError(f"--features dinov2:{model}: timm's {model} is no vision transformer with positions")
        if weights is not None:
            checkpoint = load_checkpoint(weights)
            try:
                net.load_state_dict(checkpoint.state_dict)
            except RuntimeError as error:
                raise ValueError(f"{checkpoint.path} is for another network than timm's {model}") from error
        self.sha256, self.dim = digest(net.state_dict()), net.num_features
        own = positions(net.pos_embed.data)
        net.set_input_size((SIZE, SIZE))
        net.pos_embed.data = own
        self.net = net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """As `Network.features`: the class token after the last norm."""
        return Features(self.net(prepared(images).to(self.net.pos_embed.device)).cpu())
