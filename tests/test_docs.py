"""Links of docstrings and pages lead somewhere. README stays short, names every file and explains its short names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for place in ("", "plumbing/", "tools/", "prepare/", "configs/") for path in ROOT.glob(f"{place}*.py")]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]


def headings(page):
    """The texts of a page's headings."""
    return re.findall(r"^#+ (.+)$", page.read_text(), re.M)


def test_docstrings_point_to_headings_that_exist():
    known, pointed = set(headings(ROOT / "docs" / "recipe.md")), 0
    for path in SOURCES:
        text = re.sub(r"\s+", " ", path.read_text())
        for heading in re.findall(r'docs/recipe\.md "([^"]+)"', text):
            assert heading in known, (path, heading)
            pointed += 1
    assert pointed > 10


def test_links_of_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.exists(), (page, target)
            slugs = (
                [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings(other)] if anchor else []
            )
            assert not anchor or anchor in slugs, (page, target)


def test_nothing_points_to_a_page_that_a_reader_lacks():
    for path in [*SOURCES, *PAGES, *ROOT.glob("tests/*.py")]:
        assert not re.search(r"\brecipe [0-9]|shared/" "recipe", path.read_text().replace("recipe [0-9]", "")), path


def test_readme_is_short_and_its_tree_names_every_file():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    tree = re.search(r"^## Files\n.*?```text\n(.*?)```", text, re.M | re.S)[1]
    plumbing = re.search(r"^plumbing/.*?(?=^\w)", tree, re.M | re.S)[0]
    assert set(re.findall(r"\w+\.py", plumbing)) == {path.name for path in ROOT.glob("plumbing/*.py")}
    for folder, indent in ((ROOT, ""), (ROOT / "tools", "  "), (ROOT / "prepare", "  ")):
        named = set(re.findall(rf"^{indent}(\w+\.py) +\S", tree, re.M))
        there = {path.name for path in folder.glob("*.py")}
        assert there <= named, there - named
        assert all(list(ROOT.glob(f"**/{name}")) for name in named), named


def test_readme_says_how_much_there_is_to_read():
    text = " ".join((ROOT / "README.md").read_text().split())
    first, whole = re.search(r"pre-training, about ([\d,]+) lines; .*? about ([\d,]+) lines\.", text).groups()
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES if path.parent.name != "configs"}
    of_pretraining = sum(lines[ROOT / name] for name in ("model.py", "losses.py", "data.py", "pretrain.py"))
    assert int(first.replace(",", "")) == pytest.approx(of_pretraining, rel=0.15)
    assert int(whole.replace(",", "")) == pytest.approx(sum(lines.values()), rel=0.15)


def test_readme_spells_out_its_short_names():
    text = " ".join((ROOT / "README.md").read_text().split())
    for name in ("ITC", "ITM", "MLM", "MPFC", "MVC", "PAC"):
        assert re.search(rf"\| {name} \| [\w -]+ \|", text), name
    for names in ("ITR, TIR", "TGIR", "CR", "SCR", "OCIR"):
        assert re.search(rf"\| {names} \| [\w -]+: ", text), names
    for words in ("R@k (recall at k)", "VQ-VAE (vector-quantised", "WordPiece, BERT's way to cut words"):
        assert words in text
        short = re.match(r"[\w@-]+", words)[0]
        assert text.index(short) == text.index(words), f"{short} stands before it is explained"
