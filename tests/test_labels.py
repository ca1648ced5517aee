"""labels.py: drawn labels depend on (seed, i) alone, balanced rows, files and what is wrong with them."""

import os

import numpy as np
import pytest

from fid_run.labels import LabelFile, make_labels

SEEDS = (0, 1, 2**32, 2**32 + 1, 2**40)


@pytest.mark.parametrize("mode", ["random", "balanced"])
@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_drawn_labels_stay_the_same_however_many_follow(mode, seed):
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    longest = make_labels(mode, seed, 60, 7)
    assert np.random.random() == expected  # the global generator is left alone
    assert (longest.shape, longest.dtype, set(longest)) == ((60,), np.int64, set(range(7)))
    for count in (1, 6, 7, 8, 59):
        assert make_labels(mode, seed, count, 7).tolist() == longest[:count].tolist()
    assert make_labels(mode, seed, 3, 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["random", "balanced"])
def test_seeds_differ_beyond_32_bits(mode):
    drawn = [make_labels(mode, seed, 40, 10).tolist() for seed in SEEDS]
    assert len({tuple(labels) for labels in drawn}) == len(SEEDS)


def test_random_labels_are_uniform_and_no_shift_of_those_of_another_seed():
    """They would be a shift if label i came from seed + i."""
    labels = [make_labels("random", seed, 4000, 4) for seed in (0, 1)]
    assert all(abs(count - 1000) < 110 for count in np.bincount(labels[0]))  # four standard deviations of 27
    for one, other in ((labels[0], labels[1]), (labels[0][1:], labels[1][:-1])):
        assert 0.2 < (one == other).mean() < 0.3


def test_balanced_labels_have_each_class_once_in_every_row():
    labels = make_labels("balanced", 5, 25, 10)
    rows = labels[:10], labels[10:20], labels[20:]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(10))
    assert len(set(rows[2])) == 5
    orders = [make_labels("balanced", 5, 100, 10)[i : i + 10].tolist() for i in range(0, 100, 10)]
    assert len({tuple(order) for order in orders}) == 10
    assert list(range(10)) not in orders


@pytest.mark.parametrize(
    "content",
    [b"3\n0\n2\n", b"3\n0\n2", b"3\r\n0\r\n2\r\n", b"3\n0\n2\n\n \n\n", b" 3\n0 \n\t2\n", b"3\n0\n2\n1\nabc\n-1\n"],
    ids=["plain", "no end", "CRLF", "blank lines at the end", "spaces", "more lines than images"],
)
def test_label_i_is_in_line_i_plus_1(tmp_path, content):
    path = tmp_path / "labels né.txt"
    path.write_bytes(content)
    labels = make_labels(LabelFile.read(path, 3), 7, 3, 4)
    assert (labels.tolist(), labels.dtype) == ([3, 0, 2], np.int64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 labels, but 3 images need one each"),
        ("\n\n\n\n", "0 labels, but 3 images"),
        ("1\n2\n", "2 labels, but 3 images"),
        ("0,1,2\n", "1 labels, but 3 images"),
        ("1\nabc\n2\n", "line 2: 'abc' is not a whole number from 0 up"),
        ("1\n2\n-1\n", "line 3: '-1' is not"),
        ("1\n\n2\n", "line 2: '' is not"),
        ("1\r\n2.0\r\n2\r\n", r"line 2: '2\.0' is not"),
        ("1 2\n0\n0\n", "line 1: '1 2' is not"),
        (f"0\n{'9' * 5000}\n0\n", f"line 2: '{'9' * 5000}' is not"),
        ("0\n4\n7\n", r"line 2: 4 is outside 0\.\.3"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "is neither random nor balanced nor .*not UTF-8"),
        (None, "is neither random nor balanced nor .*No such file"),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        make_labels(LabelFile.read(path, 3), 0, 3, 4)
    assert f"--labels {path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_read_once():
    reader, writer = os.pipe()
    os.write(writer, b"1\n2\n")
    os.close(writer)
    file = LabelFile.read(f"/dev/fd/{reader}", 2)
    os.close(reader)
    assert make_labels(file, 0, 2, 3).tolist() == [1, 2]


def test_unconditional_models_have_no_labels():
    assert make_labels("random", 0, 3, 0) is None
    with pytest.raises(ValueError, match="no meaning for an unconditional model; leave it out"):
        make_labels("balanced", 0, 3, 0)
