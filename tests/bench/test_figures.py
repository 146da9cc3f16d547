"""The pictures hold what the rows say: lines, bars, points and ceilings at the right places."""

from itertools import pairwise

import pytest
from matplotlib.colors import rgb_to_hsv, to_hex, to_rgb
from matplotlib.figure import Figure

from bench.report.accuracy import draw_accuracy
from bench.report.bars import draw_bars
from bench.report.figures import draw_all, slug
from bench.report.ranking import is_tilewise
from bench.report.roofline import draw_roofline, roof
from bench.report.scaling import draw_scaling
from bench.report.style import ERRORS_COUNT, LOOKS, NO_GPU, UNKNOWN, in_order, look

from .synthetic import row, section

LENGTHS = (512, 1024, 2048)


def grid(implementation: str, seconds: float, head_dim: int, kind: str):
    return [
        row(
            implementation, seconds, f"paper-d{head_dim}-{kind}-{length}", group="forward grid",
            flops=length * 10**10, bytes=10**6, sizes={"kv_len": length}, error=2e-3, torch_error=1e-3,
            allowed_error=3e-3,
        )
        for length in LENGTHS
    ]  # fmt: skip


@pytest.fixture
def grids():
    return section(
        [
            one
            for head_dim in (64, 128)
            for kind in ("full", "causal")
            for one in (
                *grid("tilewise portable", 1.0, head_dim, kind),
                *grid("sdpa cudnn", 0.5, head_dim, kind),
            )
        ]
    )


def panels(figure: Figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curve(axes, label: str):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def test_scaling_curves(grids):
    figure = draw_scaling(grids, "forward grid", "forward")
    found = panels(figure)
    assert list(found) == [f"head_dim {d}, {mask}" for mask in ("no mask", "causal mask") for d in (64, 128)]
    axes = found["head_dim 128, causal mask"]
    assert list(curve(axes, "tilewise portable").get_xdata()) == list(LENGTHS)
    assert list(curve(axes, "tilewise portable").get_ydata()) == [5.12, 10.24, 20.48]  # TFLOP in 1 s
    assert list(curve(axes, "sdpa cudnn").get_ydata()) == [10.24, 20.48, 40.96]
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == [
        "512",
        "1k",
        "2k",
    ]
    assert any(list(line.get_ydata()) == [100, 100] for line in axes.lines)  # the measured matmul
    assert any("NVIDIA H200" in text.get_text() and "2001-02-03" in text.get_text() for text in figure.texts)
    assert draw_scaling(section(grids.rows, gpu=None), "forward grid", "forward") is None


def test_bars_by_unit_and_words_for_what_is_missing():
    rows = [
        row("tilewise portable", 1.0, "prefill", flops=2 * 10**13, bytes=10**6),
        row("flex", 1.0, "prefill", flops=2 * 10**13, status="wrong"),
        row("tilewise portable", 1.0, "decode", flops=10**9, bytes=5 * 10**11),
        row("flex", 2.0, "decode", flops=10**9, bytes=5 * 10**11),
    ]
    compute, memory = draw_bars(section(rows), "models forward").axes
    assert [bar.get_width() for bar in compute.patches] == [20.0]
    assert [bar.get_width() for bar in memory.patches] == [500.0, 250.0]
    assert {"wrong", "20.0"} <= {text.get_text() for text in compute.texts}
    assert compute.get_xlabel().startswith("TFLOP/s") and memory.get_xlabel().startswith("GB/s")
    assert to_hex(memory.patches[0].get_facecolor()) == look("tilewise portable")[0].lower()
    (time,) = draw_bars(section(rows, gpu=None), "models forward").axes
    assert time.get_xlabel().startswith("s ") and len(time.patches) == 3
    assert draw_bars(section([row("flex", status="failed")]), "models forward") is None


def test_roofline_is_measured_or_the_datasheets(grids):
    axes = draw_roofline(grids).axes[0]
    xs, ys = curve(axes, "_roof").get_data()
    # Ridge: 1e14 FLOP/s over 1e12 B/s, at 100 TFLOP/s.
    assert xs[1] == pytest.approx(100) and list(ys[1:]) == [100, 100]
    assert ys[0] == pytest.approx(xs[0])  # x FLOPs a byte at 1e12 B/s are x TFLOP/s
    assert curve(axes, "_roof").get_linestyle() == "-"
    assert max(curve(axes, "sdpa cudnn").get_ydata()) == pytest.approx(40.96)
    unmeasured = section(grids.rows, ceilings=None)
    flops, bandwidth, source = roof(unmeasured)
    assert (round(flops / 1e12), bandwidth, source) == (989, 4.8e12, "datasheet")
    assert curve(draw_roofline(unmeasured).axes[0], "_roof").get_linestyle() == "--"
    assert draw_roofline(section(grids.rows, gpu="no such GPU", ceilings=None)) is None


def test_accuracy_is_in_multiples_of_pytorchs_error(grids):
    (axes,) = draw_accuracy(grids, "forward grid").axes
    assert set(curve(axes, "tilewise portable").get_xdata()) == {2.0}
    for name in ("tilewise portable", "sdpa cudnn"):
        mark, stroke = curve(axes, name), curve(axes, f"_allowed {name}")
        assert stroke.get_xdata() == pytest.approx([3.0] * (len(grids.rows) // 2))
        assert list(stroke.get_ydata()) == list(mark.get_ydata())  # in the same lane


def drawn_boxes(figure: Figure, line):
    """What each mark of a line takes on the picture, in pixels."""
    size = line.get_markersize() / 72 * figure.dpi / 2
    return [
        (x - size, x + size, y - size, y + size) for x, y in line.axes.transData.transform(line.get_xydata())
    ]


def test_equal_errors_do_not_hide_one_another():
    names = [name for name in LOOKS if name.startswith(("sdpa", "flex", "tilewise", "flash"))]
    rows = [row(name, 1.0, case, error=1e-3, torch_error=1e-3) for name in names for case in ("a", "b")]
    figure = draw_accuracy(section(rows), "models forward")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = sorted(box for name in names for box in drawn_boxes(figure, curve(axes, name)))
    assert len(boxes) == 2 * len(names)
    ends = sorted((low, high) for _, _, low, high in boxes)
    assert all(high <= low for (_, high), (low, _) in pairwise(ends))


def said(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_a_picture_explains_its_strokes_words_and_missing_gpu(grids):
    accuracy = draw_accuracy(section(grids.rows, gpu=None), "forward grid")
    legend = [text.get_text() for text in accuracy.legends[0].get_texts()]
    assert {"most that counts as right", "PyTorch's own error"} <= set(legend)
    assert "a mark beyond it is wrong" in said(accuracy) and "below 0.0625" not in said(accuracy)
    assert NO_GPU not in said(accuracy) and ERRORS_COUNT in said(accuracy)
    bars = draw_bars(section(grids.rows, gpu=None), "forward grid")
    assert NO_GPU in said(bars) and ERRORS_COUNT not in said(bars)
    assert "In place of a bar" not in said(bars)
    exact = [
        row("flex", 1.0, error=0.0, torch_error=1e-3),
        row("sdpa", status="unsupported"),
        row("jax", 1.0),
    ]
    assert "below 0.0625 stands at 0.0625" in said(draw_accuracy(section(exact), "models forward"))
    wrong = [row("flex", 1.0, status="wrong"), row("jax", 1.0), row("flex", 1.0, "two")]
    note = said(draw_bars(section(wrong), "models forward"))
    assert "wrong (the answer is wrong" in note and "not asked (" in note and "unsupported" not in note


def fill_in(rows):
    """Give the rows all sizes, so that their labels have three lines."""
    for one in rows:
        one.sizes |= dict(batch=32, q_heads=16, kv_heads=4, head_dim=128, value_dim=128)
        one.sizes["q_len"] = one.sizes["kv_len"]


@pytest.mark.parametrize("draw", [draw_accuracy, draw_bars])
def test_labels_are_words_that_lie_inside_the_picture(grids, draw):
    fill_in(grids.rows)
    figure = draw(grids, "forward grid")
    figure.draw_without_rendering()
    labels = [label for axes in figure.axes for label in axes.get_yticklabels()]
    texts = {label.get_text() for label in labels}
    assert "head_dim 128, no mask\n512 tokens, batch 32,\n16 heads on 4 key heads" in texts
    assert not any("paper-" in text or "grid:" in text for text in [*texts, said(figure)])
    width, height = figure.get_size_inches() * figure.dpi
    for text in [*labels, *figure.texts, *figure.legends]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text


def test_labels_of_neighbours_do_not_touch():
    fill_in(rows := grid("flex", 1.0, 128, "full"))
    figure = draw_bars(section(rows), "forward grid")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = sorted(
        (label.get_window_extent().y0, label.get_window_extent().y1) for label in axes.get_yticklabels()
    )
    assert len(boxes) == len(LENGTHS) and all(high < low for (_, high), (low, _) in pairwise(boxes))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 13])
def test_a_legend_reads_in_the_order_of_the_bars(count):
    """Line by line, as matplotlib lays the entries out, whatever the number of columns."""
    names = [f"flex {i:02}" for i in range(count)]
    figure = draw_bars(section([row(name, 1.0) for name in names]), "models forward")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    places = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
    assert sorted(names, key=lambda name: (-round(places[name].y0), places[name].x0)) == names
    bars = sorted(figure.axes[0].patches, key=lambda bar: bar.get_y())
    assert [bar.get_label() for bar in figure.axes[0].containers] == names and len(bars) == count


def test_the_roofline_names_cases_at_the_faster_kernel():
    rows = [
        row(name, seconds, case, flops=2 * 10**13, bytes=size)
        for case, size in (("llama3-8b-prefill", 10**11), ("gemma2-2b-local", 10**12))
        for name, seconds in (
            ("tilewise portable", 0.5),
            ("tilewise hopper", 0.4),
            ("tilewise torch", 9.0),
            ("flex", 0.6),
        )
    ]
    rows.append(row("tilewise torch", 9.0, "flux1-encoder", flops=2 * 10**13, bytes=10**10))
    axes = draw_roofline(section(rows)).axes[0]
    assert not any("FLUX" in text.get_text() for text in axes.texts)
    named = {text.get_text(): text.xy for text in axes.texts}
    assert named["Llama 3 8B, reading a prompt"] == pytest.approx((200, 50))
    assert named["Gemma 2 2B, layer with a window"] == pytest.approx((20, 50))


def test_every_picture_is_an_svg_and_a_png(grids, tmp_path):
    names = [picture.file for picture in draw_all(grids, tmp_path, slug("NVIDIA H200"))]
    assert names == [
        f"nvidia-h200-{name}"
        for name in ("roofline", "forward-grid-scaling", "forward-grid-bars", "forward-grid-errors")
    ]
    for name in names:
        assert (tmp_path / f"{name}.svg").read_text().count("<path") > 10
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_an_implementation_keeps_its_looks():
    from bench.implementations import IMPLEMENTATIONS

    looks = {name: look(name) for name in IMPLEMENTATIONS}
    colours = {colour for colour, _, _ in looks.values()}
    assert len(colours) == len(looks), "two implementations have the same colour, which is all that bars have"
    assert look("flash_attn 2") == LOOKS["flash_attn"] and look("flash_attn cute") == LOOKS["flash_attn cute"]
    assert look("something new") == look("something new")
    assert in_order(["zzz", "flex", "sdpa cudnn", "tilewise portable"]) == [
        "tilewise portable", "sdpa cudnn", "flex", "zzz",
    ]  # fmt: skip


def hue(colour: str) -> tuple[float, float]:
    """Degrees, and how strong the colour is."""
    share, saturation, value = rgb_to_hsv(to_rgb(colour))
    return 360 * share, saturation * value


def test_tilewise_alone_has_the_strong_colour():
    """Red to orange, from 0 to 30 degrees; none of the rivals, and neither black nor grey is tilewise's."""
    ours = {name: hue(colour) for name, (colour, _, _) in LOOKS.items() if is_tilewise(name)}
    rivals = {name: hue(colour) for name, (colour, _, _) in LOOKS.items() if not is_tilewise(name)}
    rivals |= {colour: hue(colour) for colour in UNKNOWN}
    assert all(0 <= degrees <= 30 for degrees, _ in ours.values())
    for name, (degrees, strength) in rivals.items():
        assert 45 <= degrees <= 330 or strength < 0.1, name
    for name in ("tilewise portable", "tilewise hopper"):
        assert ours[name][1] > 0.6
