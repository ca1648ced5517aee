"""What the documents show runs: their policies are real files, and their lists are whole."""

import re
from pathlib import Path

import pytest

import adacorr

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(adacorr.available())  # before any example is loaded


def test_every_method_is_in_the_lists():
    table, readme = (ROOT / "docs" / "policies.md").read_text(), (ROOT / "README.md").read_text()
    for name in NAMES:
        assert f"| `{name}`" in table
        assert f"`{name}`" in readme


def test_tests_that_are_referred_to_exist():
    found = 0
    for line in (ROOT / "docs" / "fid.md").read_text().splitlines():
        file = None
        for path, name in re.findall(r"`(tests/\w+\.py)?::(\w+)`", line):
            file = path or file
            assert f"def {name}(" in (ROOT / file).read_text(), line
            found += 1
    assert found > 40


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+?)\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), target
