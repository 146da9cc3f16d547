"""The pictures hold what the rows say: lines, bars, points and ceilings at the right places."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bench.report.accuracy import draw_accuracy
from bench.report.bars import draw_bars
from bench.report.figures import draw_all, slug
from bench.report.roofline import draw_roofline, roof
from bench.report.scaling import draw_scaling
from bench.report.style import LOOKS, in_order, look

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
    assert list(found) == [f"head_dim {d}, {kind}" for kind in ("full", "causal") for d in (64, 128)]
    axes = found["head_dim 128, causal"]
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
    assert curve(axes, "allowed").get_xdata() == pytest.approx([3.0] * len(grids.rows))


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
    assert len(set(looks.values())) == len(looks), "two implementations look the same"
    assert look("flash_attn 2") == LOOKS["flash_attn"] and look("flash_attn cute") == LOOKS["flash_attn cute"]
    assert look("something new") == look("something new")
    assert in_order(["zzz", "flex", "sdpa cudnn", "tilewise portable"]) == [
        "tilewise portable", "sdpa cudnn", "flex", "zzz",
    ]  # fmt: skip
