"""The Inception network of FID: the TensorFlow graph of 2015-12-05, ported to PyTorch as the weights 6726825d.

torchvision's Inception v3 has the same layers under the same names, but pools otherwise and has other weights. The
features here are those of ADM's evaluator, of torch-fidelity and, but for the resizing, of pytorch-fid.
"""

from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as stock

from checkpoint import load_checkpoint
from download import fetched
from evaluate.networks import Features

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
DIGEST = "6726825d"  # the first digits of its sha256
SIZE = 299  # pixels on each side of the input
SPATIAL = 7  # channels of Mixed_6d.branch1x1, 17 x 17 each, that sFID is taken of


class TensorFlowPooling:
    """A block whose last branch pools as TensorFlow does: what lies beyond the border does not count."""

    pool = staticmethod(partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False))

    def forward(self, x: Tensor) -> Tensor:
        last = self.branch_pool(self.pool(x))
        return torch.cat([super().forward(x)[:, : -last.shape[1]], last], dim=1)


class PooledA(TensorFlowPooling, stock.InceptionA):
    pass


class PooledC(TensorFlowPooling, stock.InceptionC):
    pass


class PooledE(TensorFlowPooling, stock.InceptionE):
    pass


def architecture() -> stock.Inception3:
    """The network with untrained weights: 1008 logits, no auxiliary head."""
    blocks = [stock.BasicConv2d, PooledA, stock.InceptionB, PooledC, stock.InceptionD, PooledE, None]
    net = stock.Inception3(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
    net.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)  # the graph's last block differs
    return net.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def resizing(size: int) -> Tensor:
    """(SIZE, size) weights of TensorFlow 1's bilinear resizing: no half-pixel centres, no antialiasing."""
    source = torch.arange(SIZE, dtype=torch.float64) * size / SIZE
    low = source.long()
    share = source - low
    weights = torch.zeros(SIZE, size, dtype=torch.float64)
    rows = torch.arange(SIZE)
    weights[rows, low] += 1 - share
    weights[rows, (low + 1).clamp_max(size - 1)] += share
    return weights.float()


def prepared(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> float32 (n, 3, SIZE, SIZE) in [-1, 1)."""
    x = images.permute(0, 3, 1, 2).float()
    height, width = (resizing(size).to(x.device) for size in x.shape[2:])
    return (height @ x @ width.T - 128) / 128


class Inception:
    """The network as `evaluate.networks` wants it. ValueError for weights that are not its own.

    weights: a local file; without one the published file, downloaded once.
    """

    name, dim, convention = "inception", 2048, f"TensorFlow 1 bilinear to {SIZE} px, (x - 128) / 128, float32"

    def __init__(self, weights: Path | None, device: torch.device | str = "cpu", offline: bool = False):
        checkpoint = load_checkpoint(fetched(URL, offline, DIGEST) if weights is None else weights)
        self.net, self.sha256 = architecture(), checkpoint.sha256
        try:
            self.net.load_state_dict(checkpoint.state_dict)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint.path} is for another network than FID's Inception of 2015") from error
        self.net.to(device, memory_format=torch.channels_last)
        self.spatial: Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL]

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """As `Network.features`; the spatial ones are in the order (row, column, channel)."""
        net = self.net
        x = prepared(images.to(net.fc.weight.device)).contiguous(memory_format=torch.channels_last)
        for layer in net.children():
            if layer is net.avgpool:
                break
            x = layer(x)
        pool = x.mean((2, 3))
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)  # ADM's order: NCHW gives nonsense against its statistics
        return Features(pool.cpu(), spatial.cpu(), (pool @ net.fc.weight.T).cpu())
