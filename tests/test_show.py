"""Pages of pictures: which queries stand on the page, what is framed, and the drawing itself."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import evaluate
import metrics
import pictures
from pictures import Cell, Row
from settings import InputError


def numbered(n, kind):
    return [Cell(text=f"{kind} {i}") for i in range(n)]


def choices_of(n, wrong=()):
    """The choices of n queries on a gallery of n unit vectors; those of `wrong` have their right item last."""
    query = torch.eye(n) + torch.linspace(0.5, 0.1, n)
    for i in wrong:
        query[i, i] = -1.0
    tensors = query, torch.eye(n), torch.arange(n), torch.arange(n)
    ranks = metrics.best_ranks(*tensors)
    return pictures.ranked_choices(ranks, numbered(n, "query"), numbered(n, "item"), *tensors)


def test_ranked_choices():
    choices = choices_of(9, wrong=[3])
    assert [i for i, choice in enumerate(choices) if choice.failed] == [3]
    query, cells = choices[2].make()
    assert query == Cell(text="query 2", label="right one: rank 1 of 9")
    assert [c.text for c in cells] == ["item 2", "item 0", "item 1", "item 3", "item 4"]
    assert [c.frame for c in cells] == [pictures.RIGHT, None, None, None, None] and "right" in cells[0].label
    query, cells = choices[3].make()
    assert query.label == "right one: rank 9 of 9" and not any(c.frame for c in cells)


@pytest.mark.parametrize("n", [1, 3, 99])
def test_a_failure_is_always_among_them(n, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr(pictures, "draw_page", lambda path, title, rows: pages.append(rows))
    for seed in range(5):
        pictures.draw_choices("a.png", "x", choices_of(40, wrong=[17]), n, seed)
        assert f"a.png (1 of {min(n, 40)} without a right one" in capsys.readouterr().out
        assert len(pages[-1]) == min(n, 40)
        assert sum(row.query.text == "query 17" for row in pages[-1]) == 1
        assert len({row.query.text for row in pages[-1]}) == len(pages[-1])


def test_recognition_shows_both_labels(tmp_path):
    (tmp_path / "labels.json").write_text('{"categories": ["dresses", "shirts"]}')
    config = evaluate.EvalConfig(task="fashiongen_category", data_root=str(tmp_path))
    wrong = [Cell(text="class 5", frame=pictures.WRONG)]
    assert evaluate.recognition_row(config, "b.jpg", 5, 1) == Row(Cell(["b.jpg"], label="true: shirts"), wrong)
    (right,) = evaluate.recognition_row(config, "a.jpg", 0, 0).results
    assert right == Cell(text="dresses", frame=pictures.RIGHT)


def test_a_query_shows_only_items_of_its_category():
    tensors = torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(4)
    category = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 0, 1])
    ranks = torch.tensor([1, 1, 1, 1])
    choices = pictures.ranked_choices(ranks, numbered(4, "query"), numbered(4, "item"), *tensors, category)
    query, cells = choices[2].make()
    assert query.label == "right one: rank 1 of 2" and [cell.text for cell in cells] == ["item 2", "item 0"]


@pytest.mark.parametrize(
    "text", ["", "word", "a long text of many words " * 9, "unbroken" * 40, "x" * 3 + " " + "y" * 99]
)
def test_wrapped_text_fits(text):
    font = ImageFont.load_default(15)
    lines = pictures.wrap(text, font, 120, 3).splitlines()
    assert len(lines) <= 3 and all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines) == text.replace(" ", "") or lines[-1].endswith("...") or text == " ".join(lines)


def test_page(tmp_path):
    """A red photo, framed, right of the line; the query's text left; nothing left aside."""
    Image.new("RGB", (30, 60), (255, 0, 0)).save(tmp_path / "red.png")
    photo = Cell([str(tmp_path / "red.png")], "a title", "1", pictures.RIGHT)
    rows = [Row(Cell(text="red"), [photo] * 7), Row(Cell(photo.images * 3), [photo])]
    pictures.draw_page(tmp_path / "page.png", "title", rows)
    page = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.png", "red.png"]
    red, green = ((page == colour).all(2).sum() for colour in ((255, 0, 0), pictures.RIGHT))
    whole, tile = pictures.CELL**2 // 2, (pictures.CELL // 2) ** 2 // 2  # the photo fills half of its square
    assert red == pytest.approx(8 * whole + 3 * tile, rel=0.01)
    frame = (pictures.CELL + 12) ** 2 - (pictures.CELL + 2) ** 2
    assert green == 8 * frame
    with pytest.raises(InputError, match="cannot be saved"):
        pictures.draw_page(tmp_path / "nowhere" / "page.png", "title", rows)


@pytest.mark.parametrize("out", ["page.txt", "nowhere/page.png"])
def test_a_page_that_cannot_be_is_said_before_the_work(out):
    with pytest.raises(InputError, match="expected the name of a .png in a folder that exists"):
        pictures.check_page(out)
