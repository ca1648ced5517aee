"""Pictures to look at: a grid of images, two pictures side by side with captions, and PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adacorr.files import written_whole

SMALLEST = 64  # pixels at which an image is shown at least; smaller ones are enlarged by repeating pixels
GAP = 2  # pixels between images; between two pictures side by side it is four times as much


def grid(images: Tensor) -> Image.Image:
    """uint8 (n, H, W, 3) -> one picture, row by row; a full rectangle where n has one not too wide."""
    n, height, width, _ = images.shape
    zoom = max(1, SMALLEST // height)
    width, height = width * zoom, height * zoom
    narrowest = math.isqrt(n - 1) + 1
    columns = next((c for c in range(narrowest, 2 * narrowest) if n % c == 0), narrowest)
    rows = math.ceil(n / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images.numpy()):
        tile = Image.fromarray(image.repeat(zoom, axis=0).repeat(zoom, axis=1))
        sheet.paste(tile, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return sheet


def side_by_side(left: Image.Image, right: Image.Image, captions: Sequence[str]) -> Image.Image:
    """Two pictures of one size with a caption over each."""
    font = ImageFont.load_default()
    boxes = [font.getbbox(caption) for caption in captions]
    top = math.ceil(max(box[3] for box in boxes)) + 2 * GAP
    width = max(left.width, *(math.ceil(box[2]) for box in boxes))
    sheet = Image.new("RGB", (2 * width + 4 * GAP, top + left.height), "white")
    for x, picture, caption in zip((0, width + 4 * GAP), (left, right), captions, strict=True):
        sheet.paste(picture, (x, top))
        ImageDraw.Draw(sheet).text((x, GAP), caption, fill="black", font=font)
    return sheet


def save_png(path: Path, picture: Image.Image) -> None:
    """A PNG, whole or not at all."""
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")
