"""What `tilewise demo` prints and draws of numbers that were chosen by hand."""

import io
import math

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from tilewise.demo import measure
from tilewise.demo.figures import attention_figure, draw_attention
from tilewise.demo.report import print_similarities


def test_matrices_too_wide_for_the_console_become_a_list_of_pairs():
    alike = measure.similarities(torch.tensor([[1.0, 0], [0, 1], [0, 2], [4, 0], [5, 5], [3, 0]]))
    for width, shown in ((47, "cosine: e · f / (|e| |f|)"), (46, "1 and 4")):
        console = Console(file=io.StringIO(), width=width)
        print_similarities(console, alike, [f"sentence {'long ' * 20}{i}" for i in range(6)], 2)
        assert shown in console.file.getvalue().replace("\n", " ")
        assert max(map(len, console.file.getvalue().splitlines())) <= width
        assert "most alike: 'sentence" in console.file.getvalue()


def test_each_matrix_ends_with_its_most_alike_pairs():
    """Where the lengths of embeddings differ, the dot product's pairs are not those of the cosine."""
    sentences = ["short [b]", "水 of a kind", "long one", "another"]
    alike = measure.similarities(torch.tensor([[1.0, 0.1], [1.0, 0.0], [8.0, 6.0], [0.0, 9.0]]))
    console = Console(file=io.StringIO(), width=80)
    print_similarities(console, alike, sentences, 2)
    _, dot, scaled, cosine = console.file.getvalue().split("most alike: ")
    (first, second, third) = dot.splitlines()[:3]
    assert first == "'long one' and 'another' (54.00)"
    assert second.strip() == "'short [b]' and 'long one' (8.60)" and "'水 of a kind' and 'long one'" in third
    assert scaled.startswith("'long one' and 'another' (38.18)")
    assert cosine.startswith("'short [b]' and '水 of a kind' (1.00)")
    assert all(len(part.split("\n\n")[0].splitlines()) == 3 for part in (dot, scaled, cosine))

    console = Console(file=io.StringIO(), width=60)
    both_long = ["x" * 100, "y" * 100]
    print_similarities(console, measure.similarities(torch.eye(2)), both_long, 2)
    lines = [line for line in console.file.getvalue().splitlines() if "most alike" in line]
    assert len(lines) == 3 and all("x…' and 'yy" in line and line.endswith("(0.00)") for line in lines)
    assert max(map(len, console.file.getvalue().splitlines())) <= 60

    console = Console(file=io.StringIO(), width=60)
    print_similarities(console, measure.similarities(torch.eye(2)[:1]), ["alone"], 2)
    assert "most alike" not in console.file.getvalue()


def test_what_goes_to_cls_does_not_drown_the_words():
    words = ["[CLS]", "a", "kit", "##ten", "[SEP]"]
    weights = torch.tensor([[0.9, 0.02, 0.03, 0.01, 0.04]]).repeat(5, 1)
    figure = attention_figure(weights, words, "a title")
    left, right = figure.axes[:2]
    ((greys,), (colours,)) = left.images, right.images
    assert greys.get_array().shape == (5, 2) and greys.get_clim() == (0, 1)
    assert colours.get_array().shape == (5, 3) and colours.get_clim() == pytest.approx((0, 0.03))
    assert left.get_xlim() == (0.5, 2.5) and right.get_xlim() == (1.5, 4.5)
    assert [text.get_text() for text in left.texts][:2] == ["0.90", "0.04"]
    shades = colours.norm(torch.tensor([0.0, 0.01, 0.03]).numpy())
    assert list(shades) == pytest.approx([0, math.sqrt(1 / 3), 1])
    shown = [label.get_text() for label in right.get_xticklabels()]
    places = [place for place in right.get_xticks() if 1.5 < place < 4.5]
    assert [shown[list(right.get_xticks()).index(place)] for place in places] == ["a", "kit", "##ten"]
    title, said = (text.get_text().replace("\n", " ") for text in figure.texts)
    assert title == "a title"
    for words in ("[CLS] and [SEP], marks that the model adds, have a scale of their own", "end at 0.03",
                  "square root", "## goes on"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("count", [2, 3, 65, 66])
def test_the_attention_of_a_sentence_of_any_length(tmp_path, count):
    words = ["[CLS]", *["so"] * (count - 2), "[SEP]"]
    draw_attention(tmp_path / "attention.png", torch.eye(count), words, "a title")
    assert imread(tmp_path / "attention.png")[..., :3].std() > 0.05
    axes = attention_figure(torch.eye(count), words, "a title").axes
    assert len(axes) == (1 if count == 2 else 3)
    labelled = "so" in [label.get_text() for each in axes for label in each.get_xticklabels()]
    assert labelled == (count == 3)
    assert axes[0].get_xlim() == (0.5, 2.5) and axes[0].get_ylim() == (count + 0.5, 0.5)
