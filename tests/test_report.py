"""`python -m evaluate report`: one page that needs nothing else, with what was given on it, and nothing run from it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import code, one_line, result_file
from images import pictures
from PIL import Image

from evaluate import report
from evaluate.__main__ import main
from evaluate.bench import Row
from evaluate.fidelity import psnr
from evaluate.imagesets import ImageSet, open_images
from evaluate.leaderboard import summary
from evaluate.report import groups, look, spent

SHIPPED = Path(__file__).parents[1] / "docs" / "compare.json"
EVIL = "<script>alert(1)</script>\"'&</td>"
ALONE = {"meta", "link", "img", "br"}  # elements without an end


class Reader(HTMLParser):
    """Holds the page to balanced elements and to no reference but data; collects pictures, cells and scripts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.pictures, self.rows, self.targets, self.ids, self.scripts = [], [], [], [], [], 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs)
        assert not {"href", "src", "srcset", "action", "data"} & attrs.keys() or tag in ("a", "img")
        if tag == "img":
            assert attrs["src"].startswith("data:image/png;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))))
        if tag == "a":
            self.targets.append(attrs["href"])
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.scripts += tag == "script"
        self.rows += [[]] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path, capsys):
    """Runs the command on words -> the page, held to what every page must be."""

    def call(*words):
        out = tmp_path / "out" / "report.html"
        assert main(["report", *map(str, words), "--out", str(out)]) == 0, capsys.readouterr().err
        content = out.read_text(encoding="utf-8")
        found = Reader(content)
        assert found.targets == [f"#{name}" for name in found.ids]  # of the table of contents
        assert found.scripts == 1
        assert not re.search(r"https?:|url\(|@import", content)
        return content, found

    return call


def folder(path, images):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def test_results_are_on_the_page_and_everything_is_escaped(page, tmp_path):
    name = "a<b>&.png"
    Image.fromarray(pictures(1)[0]).save(tmp_path / name)
    table = {"columns": ["method", EVIL], "rows": [["`--cache x`", "1.5"], [EVIL, "2"]]}
    first, second = tmp_path / "first.json", tmp_path / "<i>.json"
    shown = {"table": table, "notes": [EVIL], "images": [name]}
    result_file(first, "fidelity", ["python", EVIL, "$title"], **shown, identity={}, rows=[{"checkpoint": "x"}])
    result_file(second)
    content, found = page(first, second)
    assert found.rows == [["method", EVIL], ["--cache x", "1.5"], [EVIL, "2"]]
    assert content.count(EVIL) == 0
    assert "<td><code>--cache x</code></td>" in content
    assert "$title" in content
    assert [np.asarray(shown).tolist() for shown in found.pictures] == [pictures(1)[0].tolist()]
    assert found.targets == ["#s1", "#s2"]


def test_the_shipped_comparison(page):
    rows = json.loads(SHIPPED.read_text())["rows"]
    content, found = page(SHIPPED)
    assert len(found.pictures) == 1  # the plot beside it
    table = summary([*map(Row.of, rows)], (0.5, 0.35, 0.25, 0.15), "", lambda row: row.score)[1]
    assert found.rows[1 : 1 + len(table)] == table
    every = found.rows[-len(rows) :]
    assert [row[1:4] for row in every] == [[row["method"], row["form"], str(row["level"] or "")] for row in rows]
    assert [row[4] for row in every] == [f"{row['compute']:.3f}" for row in rows]


def test_images_stand_beside_their_error(page, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "WORST", 2)
    a = pictures(20, size=16)
    b = a.copy()
    b[0, 0, 0] = a[0, 0, 0] ^ 1
    b[19] = 255 - a[19]  # in the second batch
    b[3, :8] = a[3, :8] ^ 4
    content, found = page(folder(tmp_path / "a", a), folder(tmp_path / EVIL.replace("/", ""), b), "--images", 1)
    assert len(found.pictures) == 1 + 2
    for i, strip in zip((0, 19, 3), found.pictures, strict=True):
        error = np.clip(8 * np.abs(a[i].astype(int) - b[i]), 0, 255)
        for column, expected in enumerate((a[i], b[i], error)):  # 16 pixels are shown as 64, with gaps of 2
            shown = strip.crop((66 * column, 0, 66 * column + 64, 64))
            assert (np.asarray(shown)[::4, ::4] == expected).all()
    order = re.findall(r"image (\d+): ([\d.]+|identical)", re.sub(r'alt="[^"]*"', "", content))
    scores = psnr(torch.from_numpy(a), torch.from_numpy(b))
    assert order == [(str(i), f"{scores[i]:.2f}") for i in (0, 19, 3)]
    assert found.rows[1][1:] == ["20", "", "", "", "reference"]
    finite = scores[scores.isfinite()]
    assert found.rows[2][4:] == ["17", f"{finite.mean():.2f} / {finite.quantile(0.05):.2f} / {finite.min():.2f}"]


def test_a_set_alone_is_shown(page, tmp_path):
    _, found = page(folder(tmp_path / "a", pictures(6, size=16)), "--images", 4)
    assert [shown.size for shown in found.pictures] == [(130, 130)]


def protocol(cache=None, steps=50, seed=0):
    return {"cache": cache, "seed": seed, "sampler": {"spec": "ddim", "steps": steps}}


def image_set(name, *values):
    image = np.zeros((12, 12, 3), np.uint8)
    return ImageSet(Path(name), 1, (12, 12), lambda: iter([image]), protocol=protocol(*values))


def test_sets_of_one_noise_are_compared_with_the_uncached_one():
    cached, fewer, full = image_set("cached", {}), image_set("fewer", None, 20), image_set("full")
    other = image_set("other", None, 50, 1)
    found = groups([cached, other, fewer, full])
    assert [[own.path.name for own in group] for group in found] == [["full", "fewer", "cached"], ["other"]]
    plain = ImageSet(Path("plain"), 1, (12, 12), lambda: iter([]))  # of no known protocol, so it fits all of a group
    for order in ([plain, full, other], [full, other, plain], [other, plain, full]):
        assert all({"full", "other"} - {own.path.name for own in group} for group in groups(order))
    scores, first, worst = look(full, cached, 5)
    assert (scores.tolist(), len(first), len(worst)) == ([np.inf], 1, 1)


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"kind": "cost"')
    Path("text.png").write_text("no picture")
    for name in ("../secret.png", "none.png", "text.png"):
        result_file(Path(name).with_suffix(".json").name, images=[name])
    result_file("odd.json", table={"columns": ["a"], "rows": [[1]]})
    folder(tmp_path / "a", pictures(2, size=16))
    folder(tmp_path / "b", pictures(3, size=16))
    cases = {
        "broken.json": "not a whole one",
        "secret.json": "not beside it",
        "none.json": "none.png",
        "odd.json": "not as `python -m evaluate` writes it",
        "text.json": "no PNG",
        "a b": "lacks 1 of the 3",
        "nothing": "does not exist",
        "a --images 0": "--images: 0",
    }
    for words, part in cases.items():
        assert code(main, "report", words, "--out report.html") == 2
        one_line(capsys, part)
        assert not Path("report.html").exists()


def test_what_a_run_spent_is_found_beside_its_npz(sampled):
    folder = sampled("cached")
    packed = folder.with_name(f"{folder.name}.npz")
    one, two = spent(open_images(folder)), spent(open_images(packed))
    assert one[1:] == two[1:]
    assert float(one[2]) > 0
