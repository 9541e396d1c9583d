"""evaluate.py --show: which queries stand on the page, what is framed, and the drawing itself."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import evaluate
import pictures
from settings import InputError


def numbered(n, kind):
    return [{"text": f"{kind} {i}"} for i in range(n)]


def line_of(n, wrong=()):
    """n queries on a gallery of n unit vectors; those of `wrong` have their right item last."""
    gallery = torch.eye(n)
    query = torch.eye(n) + torch.linspace(0.5, 0.1, n)
    for i in wrong:
        query[i, i] = -1.0
    return query, gallery, torch.arange(n), torch.arange(n), numbered(n, "query"), numbered(n, "item")


def test_ranked_pictures():
    failed, draw = evaluate.ranked_pictures([line_of(8, wrong=[3]), line_of(9)])
    assert failed.nonzero().flatten().tolist() == [3]
    query, cells = draw(8 + 2)  # the second set's third
    assert query == {"text": "query 2", "label": "right one: rank 1 of 9"}
    assert [c["text"] for c in cells] == ["item 2", "item 0", "item 1", "item 3", "item 4"]
    assert [c["frame"] for c in cells] == [pictures.RIGHT, None, None, None, None] and "right" in cells[0]["label"]
    query, cells = draw(3)
    assert query["label"] == "right one: rank 8 of 8" and not any(c["frame"] for c in cells)


@pytest.mark.parametrize("n", [1, 3, 99])
def test_a_failure_is_always_among_them(n, monkeypatch):
    pages = []
    monkeypatch.setattr(pictures, "draw_sheet", lambda path, title, rows: pages.append(rows))
    sets = [line_of(40, wrong=[17])]
    for seed in range(5):
        config = evaluate.EvalConfig(task="fashioniq", show=n, seed=seed)
        evaluate.show("x", {"pictures": lambda: evaluate.ranked_pictures(sets)}, config, "a.png")
        assert len(pages[-1]) == min(n, 40)
        assert sum(query["text"] == "query 17" for query, _ in pages[-1]) == 1
        assert len({query["text"] for query, _ in pages[-1]}) == len(pages[-1])


def test_recognition_shows_both_labels(tmp_path):
    (tmp_path / "labels.json").write_text('{"categories": ["dresses", "shirts"]}')
    config = evaluate.EvalConfig(task="fashiongen_category", data_root=str(tmp_path))
    items = [{"image": "a.jpg", "text": "a"}, {"image": "b.jpg", "text": "b"}]
    failed, draw = evaluate.labelled_pictures(items, torch.tensor([0, 5]), torch.tensor([0, 1]), config)
    assert failed.tolist() == [False, True]
    assert draw(1) == (
        None,
        [{"images": ["b.jpg"], "label": "predicted: class 5", "text": "true: shirts", "frame": pictures.WRONG}],
    )
    assert draw(0)[1][0]["frame"] == pictures.RIGHT


@pytest.mark.parametrize(
    "text", ["", "word", "a long text of many words " * 9, "unbroken" * 40, "x" * 3 + " " + "y" * 99]
)
def test_wrapped_text_fits(text):
    font = ImageFont.load_default(15)
    lines = pictures.wrap(text, font, 120, 3)
    assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines) == text.replace(" ", "") or lines[-1].endswith("...") or text == " ".join(lines)


def test_sheet(tmp_path):
    """A red photo, framed, right of the line; the query's text left; nothing left aside."""
    Image.new("RGB", (30, 60), (255, 0, 0)).save(tmp_path / "red.png")
    photo = {"images": [str(tmp_path / "red.png")], "label": "1", "text": "a title", "frame": pictures.RIGHT}
    rows = [({"text": "red"}, [photo] * 7), ({"images": [photo["images"][0]] * 3}, [photo])]
    pictures.draw_sheet(tmp_path / "page.png", "title", rows)
    page = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.png", "red.png"]
    red, green = ((page == colour).all(2).sum() for colour in ((255, 0, 0), pictures.RIGHT))
    whole, tile = pictures.CELL**2 // 2, (pictures.CELL // 2) ** 2 // 2  # the photo fills half of its square
    assert red == pytest.approx(8 * whole + 3 * tile, rel=0.01)
    frame = (pictures.CELL + 12) ** 2 - (pictures.CELL + 2) ** 2
    assert green == 8 * frame
    with pytest.raises(InputError, match="cannot be saved"):
        pictures.draw_sheet(tmp_path / "nowhere" / "page.png", "title", rows)


@pytest.mark.parametrize("out", ["page.txt", "nowhere/page.png"])
def test_a_page_that_cannot_be_is_said_before_the_work(out):
    with pytest.raises(InputError, match="expected the name of a .png in a folder that exists"):
        pictures.check_page(out)
