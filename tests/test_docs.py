"""Links of docstrings and pages lead somewhere, and README stays short and names every file."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("configs/*.py")]
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


def test_readme_is_short_and_names_every_file():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in text, path.name
