"""The benchmark of the loop runs, and stands on what it says: pictures like photographs, and every part of the loop."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import sample_ddp
from benchmarks import loop
from ddp.image_store import PNG_LEVEL
from ddp.worker import Writer


def test_it_prints_a_table_and_writes_the_same_numbers(capsys, tmp_path):
    flags = "--seconds 0.02 0.01 --batch-size 2 --image-size 16 --num-sampling-steps 3 --batches 3 --model DiT-Ti/2"
    loop.main([*flags.split(), "--out", f"{tmp_path / 'loop.json'}"])
    lines = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "loop.json").read_text())
    assert {line.count("|") for line in lines[:6]} == {9}
    assert [(row["alone"], row["store"]) for row in content["rows"]] == [
        (seconds, store) for seconds in (0.02, 0.01) for store in ("png", "npz-shards")
    ]
    for row in content["rows"]:
        assert row["over_alone"] > 0
        assert row["batch_beside_sampling"] >= 3 * row["check_of_a_step"] > 0
    assert all(value > 0 for value in content["once"].values())


@pytest.mark.parametrize("writer", [Writer, loop.InTurn])
def test_every_batch_is_written_and_logged(monkeypatch, writer):
    written = []
    monkeypatch.setattr(loop.STORES["png"], "write", lambda self, indices, labels, images: written.append(len(images)))
    pipe = loop.Stand(loop.natural(4, 16), 3, 0.0)
    spent, tail = loop.run(pipe, "png", 5, writer)
    assert written == [4] * 5
    assert len(spent) == len(pipe.began) == len(pipe.checked) == 5
    assert tail > 0
    assert sample_ddp.Writer is Writer


def test_pictures_compress_like_photographs():
    (picture,) = loop.natural(1, 256)
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG", compress_level=PNG_LEVEL)
    assert 57 < encoded.tell() / 1024 < 120
    assert 30 < np.std(picture) < 70
