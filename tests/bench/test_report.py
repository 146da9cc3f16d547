"""What a report says of rows whose rates, ratios and means were worked out by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench.__main__ import build_app, what_to_install
from bench.report import units
from bench.report.goals import GOALS, Goal, outcome
from bench.report.page import write_report
from bench.report.ranking import Contest, contests, limit
from bench.report.readme import NOTHING, filled, performance
from bench.report.sections import gather
from bench.report.summary import (
    NO_SPEED,
    gain_table,
    goal_table,
    print_summary,
    ratio_table,
    standings,
    status_lines,
)
from bench.report.table import group_table, reasons
from bench.results import Ceilings, Check, Results, append, load

from .synthetic import CEILINGS, machine, row, section

ROOT = Path(__file__).resolve().parents[2]


def lines_of(table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, line, strict=True)) for line in table.lines]


def test_units():
    assert [units.duration(s) for s in (2.5, 0.0123, 9.996e-4, 8e-7)] == [
        "2.50 s",
        "12.3 ms",
        "1.00 ms",
        "0.800 µs",
    ]
    assert units.span(1.234e-3, 0.9e-3, like=1e-3) == "1.23 to 0.900"
    assert [units.memory(n) for n in (0, 512, 3 << 19)] == ["0", "512 B", "1.50 MiB"]
    assert [units.times(r) for r in (0.123, 1.0, 15.44)] == ["0.12×", "1.00×", "15.4×"]
    assert [units.percent(r) for r in (0.0123, 0.755)] == ["1.2 %", "76 %"]


def test_a_wrong_rival_is_never_the_fastest():
    ours = row("tilewise portable", 2e-3)
    rivals = [row("flex", 1e-3, status="wrong"), row("sdpa cudnn", 3e-3), row("sdpa flash", 4e-3)]
    contest = Contest((ours, *rivals))
    assert contest.rival.implementation == "sdpa cudnn"
    assert contest.ratio(ours) == pytest.approx(1.5)
    assert [contest.ratio(rival) for rival in rivals] == [None, 1.0, pytest.approx(0.75)]


def test_part_of_a_call_has_no_ratio():
    part = row("tilewise portable, no launch", 1e-6)
    assert Contest((part, row("sdpa", 2e-6))).ratio(part) is None


@pytest.mark.parametrize(
    "flops, size, expected",
    # 1e12 B/s and 1e14 FLOP/s: a byte takes as long as 100 FLOPs.
    [(100, 1, "compute"), (99, 1, "memory"), (0, 1, None), (100, 0, None)],
)
def test_limit(flops, size, expected):
    assert limit(row("flex", 1.0, flops=flops, bytes=size), CEILINGS) == expected


def test_limit_needs_the_rate_of_the_dtype():
    assert limit(row("flex", 1.0, flops=1, bytes=1, dtype="float32"), CEILINGS) is None
    assert limit(row("flex", 1.0, flops=1, bytes=1), Ceilings(None, {"bfloat16": 1.0})) is None


def test_table_of_a_group():
    rows = [
        row("tilewise portable", [1e-3, 2e-3, 3e-3], flops=10**11, bytes=10**8, peak_bytes=1 << 20,
            error=1e-3, torch_error=2e-3),
        row("sdpa cudnn", 1e-3, flops=10**11, bytes=10**8),
        row("flex", 5e-4, flops=10**11, status="wrong", reason="error 1 is above 0.1"),
        row("tilewise portable", 1e-3, "decode", flops=10**9, bytes=5 * 10**8),
    ]  # fmt: skip
    cudnn, ours, wrong, decode = lines_of(group_table(section(rows), "models forward"))
    assert (cudnn["case"], cudnn["implementation"], cudnn["ratio"]) == ("one", "sdpa cudnn", "1.00×")
    assert cudnn["TFLOP/s"] == "100" and cudnn["of matmul"] == "100 %"
    # Median 2 ms: 1e11 / 2e-3 = 50 TFLOP/s, half of the ceiling. Of three samples p20 is 0.4 of the way from
    # the first to the second.
    assert (ours["case"], ours["median"], ours["p20 to p80"]) == ("", "2.00 ms", "1.40 to 2.60")
    assert (ours["TFLOP/s"], ours["of matmul"], ours["ratio"], ours["GB/s"]) == ("50.0", "50 %", "0.50×", "")
    assert (ours["extra memory"], ours["error"], ours["PyTorch's error"]) == (
        "1.00 MiB",
        "1.0e-03",
        "2.0e-03",
    )
    assert (wrong["status"], wrong["TFLOP/s"], wrong["ratio"]) == ("WRONG", "", "")
    # 5e8 bytes in 1 ms are 500 GB/s, half of the copy.
    assert (decode["case"], decode["GB/s"], decode["of copy"], decode["ratio"]) == (
        "decode",
        "500",
        "50 %",
        "",
    )


def test_table_without_a_gpu_has_no_rates_and_no_ratios():
    rows = [row("tilewise portable", 1.0, flops=10, bytes=1), row("sdpa math", 2.0, flops=10, bytes=1)]
    table = group_table(section(rows, gpu=None), "models forward")
    assert table.columns == ("case", "implementation", "median", "p20 to p80")


def test_reasons_are_said_once():
    rows = [row("xformers", case=case, status="unavailable", reason="not installed") for case in "abc"]
    rows += [row("sdpa flash", case=case, status="unsupported", reason="no\nmask") for case in "bc"]
    rows += [row("tilewise portable", 1.0, case=case) for case in "abcd"]
    assert reasons(rows[:3]) == ["xformers: unavailable in every case: not installed"]
    assert reasons(rows)[1:] == ["sdpa flash: unsupported in b, c: no mask"]
    markdown = group_table(section(rows), "models forward").markdown()
    assert "| xformers" not in markdown and "- xformers: unavailable in a, b, c: not installed" in markdown


def test_standing_is_a_geometric_mean_over_shared_cases():
    rows = [
        *(row("tilewise portable", 1.0, case) for case in "abc"),
        row("tilewise portable", case="d", status="failed"),
        row("tilewise torch", 1.0, "a"),
        row("flex", 2.0, "a"),
        row("sdpa cudnn", 0.5, "b"),
        row("sdpa flash", 3.0, "b"),
        row("flex", 9.0, "c", status="wrong"),
        row("flex", 1.0, "d"),
    ]
    (standing,) = standings(rows)
    assert standing.ratios == {"a": 2.0, "b": 0.5}
    assert standing.mean == pytest.approx(1.0)
    assert (standing.alone, standing.missing) == (("c",), ("d",))
    (line,) = lines_of(ratio_table(section(rows)))
    assert (line["ratio"], line["cases"], line["no rival could"], line["no answer"]) == (
        "1.00×",
        "2",
        "1",
        "1",
    )
    assert (line["lowest"], line["highest"]) == ("0.50× b", "2.00× a")


def grid_row(implementation: str, seconds: float, length: int, **changes):
    sizes = {"kv_len": length, "q_len": length}
    return row(
        implementation, seconds, f"paper-d128-full-{length}", group="forward grid", sizes=sizes, **changes
    )


def test_goal_counts_only_the_rows_it_speaks_of():
    rows = [
        grid_row("tilewise portable", 1.0, 8192), grid_row("flex", 0.8, 8192),
        grid_row("tilewise portable", 1.0, 16384), grid_row("flex", 1.25, 16384),
        grid_row("tilewise portable", 1.0, 2048), grid_row("flex", 0.1, 2048),
    ]  # fmt: skip
    result = outcome(GOALS[0], contests(rows), ["tilewise portable"], "NVIDIA H200")
    assert result.value == pytest.approx(1.0) and len(result.cases) == 2  # √(0.8 · 1.25)
    (line,) = [line for line in lines_of(goal_table(section(rows))) if line["goal"] == GOALS[0].name]
    assert (line["result"], line["level"]) == ("1.00×", "target")
    assert goal_table(section(rows, gpu="NVIDIA A100")) is None
    assert goal_table(section(rows, gpu=None)) is None


def test_the_goals_are_judged_for_the_faster_of_two_kernels():
    """Ratios of 0.8 and 2 at the portable kernel, of 1 and 1 at Hopper's; so 1 and 2 at the faster."""
    flops = dict(flops=10**15)
    rows = [
        grid_row("tilewise portable", 1.0, 4096, **flops), grid_row("tilewise hopper", 0.8, 4096, **flops),
        grid_row("flex", 0.8, 4096),
        grid_row("tilewise portable", 2.0, 8192, **flops), grid_row("tilewise hopper", 4.0, 8192, **flops),
        grid_row("flex", 4.0, 8192),
        grid_row("tilewise hopper", 0.1, 2048, **flops), grid_row("flex", 0.8, 2048),
    ]  # fmt: skip
    lines = [line for line in lines_of(goal_table(section(rows))) if line["implementation"]]
    ratio = {line["implementation"]: line["result"] for line in lines if line["goal"] == GOALS[0].name}
    assert ratio == {
        "tilewise portable": "1.26×", "tilewise hopper": "1.00×", "tilewise, the faster": "1.41×",
    }  # fmt: skip
    # FLOPs a second are those of the slowest case: 1e15 in 2 s at the portable kernel, in 4 s at Hopper's.
    rate = {line["implementation"]: line["result"] for line in lines if line["goal"] == GOALS[1].name}
    assert rate == {
        "tilewise portable": "500 TFLOP/s", "tilewise hopper": "250 TFLOP/s",
        "tilewise, the faster": "500 TFLOP/s",
    }  # fmt: skip
    assert [line["level"] for line in lines if line["goal"] == GOALS[1].name] == [
        "below floor", "floor", "floor",
    ]  # fmt: skip

    table = lines_of(ratio_table(section(rows)))
    assert [(line["implementation"], line["ratio"], line["cases"]) for line in table] == [
        ("tilewise portable", "1.26×", "2"), ("tilewise hopper", "2.00×", "3"),
        ("tilewise, the faster", "2.52×", "3"),
    ]  # fmt: skip


def test_what_hoppers_forward_gains_over_the_portable_one():
    rows = [
        *(row("tilewise portable", 2.0, case) for case in "abcd"),
        row("tilewise hopper", 1.0, "a"),
        row("tilewise hopper", 4.0, "b"),
        row("tilewise hopper", 1.0, "c", status="wrong"),
        row("tilewise hopper", case="d", status="unsupported", reason="mask Documents may leave out a key"),
        row("tilewise portable", 2.0, work="backward", group="models backward"),
        row("tilewise hopper", 1.0, work="backward", group="models backward"),
    ]
    (line,) = lines_of(gain_table(section(rows)))
    assert (line["group"], line["ratio"], line["cases"]) == ("models forward", "1.00×", "2")
    assert (line["lowest"], line["highest"]) == ("0.50× b", "2.00× a")
    by_case = [(line["implementation"], line["over portable"]) for line in
               lines_of(group_table(section(rows[:6]), "models forward"))]  # fmt: skip
    assert by_case[:4] == [
        ("tilewise hopper", "2.00×"), ("tilewise portable", ""), ("tilewise portable", ""),
        ("tilewise hopper", "0.50×"),
    ]  # fmt: skip
    assert gain_table(section(rows[:4])).lines == ()
    assert "tilewise hopper: unsupported in d: mask Documents may leave out a key" in reasons(rows)
    assert "Hopper's forward over the portable one" in performance([section(rows)])


def test_goal_in_seconds_is_of_the_slowest_case():
    goal = next(goal for goal in GOALS if goal.measure == "seconds" and "host" in goal.name)
    rows = [
        row("tilewise portable", seconds, case, work="host forward")
        for seconds, case in ((12e-6, "host-plain"), (14e-6, "host-causal"), (90e-6, "host-plain-training"))
    ]
    result = outcome(goal, contests(rows), ["tilewise portable"], "NVIDIA H200")
    assert result.value == 14e-6 and goal.verdict(14e-6) == "target" and goal.verdict(26e-6) == "below floor"


def test_goal_of_bandwidth_is_a_share_of_the_datasheets():
    goal = next(goal for goal in GOALS if goal.measure == "bandwidth")
    decode = row("tilewise portable", 1e-3, "llama3-8b-decode", bytes=36 * 10**8, sizes={"q_len": 1})
    # 3.6e9 bytes in 1 ms are 3.6 TB/s; the H200's datasheet says 4.8.
    assert outcome(goal, contests([decode]), ["tilewise portable"], "NVIDIA H200").value == pytest.approx(
        0.75
    )


def packed_row(case: str, seconds: float, implementation: str = "tilewise portable", **changes):
    flops = {"equal": 8 * 10**12, "dense": 8 * 10**12, "mixed": 3 * 10**12}[case.split("-")[-1]]
    given = dict(group="packed forward", flops=flops) | changes
    return row(implementation, seconds, f"packed-{case}", **given)


def test_goals_of_pages_hold_them_against_the_same_cache_without():
    of_64, of_16, *_ = (goal for goal in GOALS if goal.measure == "beside")
    given = dict(group="decode", flops=10**9, bytes=10**9, sizes={"q_len": 1})
    rows = [
        row("tilewise portable", seconds, f"cached-a{kind}", **given)
        for kind, seconds in (("", 1.0), ("-pages64", 1.25), ("-pages16", 2.0))
    ]
    rows.append(row("tilewise portable", 1.0, "cached-b-pages64", **given))  # nothing beside it
    ours = ["tilewise portable"]
    for goal, value, kind in ((of_64, 0.8, "-pages64"), (of_16, 0.5, "-pages16")):
        found = outcome(goal, contests(rows), ours, "NVIDIA H200")
        assert found.cases == (f"cached-a{kind}, forward",) and found.value == pytest.approx(value)
    assert (of_64.verdict(1.0), of_64.verdict(0.91), of_16.verdict(0.91)) == ("stretch", "floor", "target")
    (bandwidth,) = (goal for goal in GOALS if goal.measure == "bandwidth")
    assert outcome(bandwidth, contests(rows), ours, "NVIDIA H200").cases == ("cached-a, forward",)


def test_goals_of_packed_sequences_hold_them_against_dense_and_equal_ones():
    *_, dense, even = (goal for goal in GOALS if goal.measure == "beside")
    backward = dict(work="backward", group="packed backward")
    rows = [
        packed_row("a-equal", 1.0), packed_row("a-dense", 0.98), packed_row("a-mixed", 0.5),
        packed_row("a-equal", 4.0, **backward), packed_row("a-dense", 2.0, **backward),
        packed_row("a-dense", 0.1, "flex"), packed_row("a-equal", 0.1, "flex"),
        packed_row("b-equal", 1.0), packed_row("b-dense", 0.5, status="wrong"), packed_row("c-mixed", 1.0),
    ]  # fmt: skip
    ours = ["tilewise portable"]
    # 0.98 forward and 0.5 backward; nothing right stands beside b.
    found = outcome(dense, contests(rows), ours, "NVIDIA H200")
    assert found.cases == ("packed-a-equal, forward", "packed-a-equal, backward")
    assert found.value == pytest.approx((0.98 * 0.5) ** 0.5) and dense.verdict(0.98) == "target"
    # 3e12 in 0.5 s where equal lengths do 8e12 in 1 s.
    found = outcome(even, contests(rows), ours, "NVIDIA H200")
    assert found.cases == ("packed-a-mixed, forward",) and found.value == pytest.approx(0.75)
    lines = {line["goal"]: line for line in lines_of(goal_table(section(rows))) if line["implementation"]}
    assert (lines[dense.name]["result"], lines[dense.name]["level"]) == ("0.70×", "below floor")
    assert (lines[even.name]["result"], lines[even.name]["level"]) == ("0.75×", "target")


def test_every_goal_speaks_of_a_case_that_exists():
    from bench.groups import GROUPS, comparisons
    from bench.implementations import select
    from bench.measure import blank

    (ours,) = select(["tilewise portable"])
    rows = [blank(case, work, name, ours) for name in GROUPS for case, work in comparisons(name, tiny=False)]
    assert all(any(map(goal.covers, rows)) for goal in GOALS)


def test_verdict_of_a_goal_without_stretch():
    goal = Goal("any", lambda row: True, 2.0, 3.0, None)
    assert [goal.verdict(value) for value in (1.9, 2.0, 9.0)] == ["below floor", "floor", "target"]
    assert goal.written(None) == ""


def test_results_of_one_machine_are_one_section_and_the_last_row_counts():
    first = Results(
        machine(date="2001-02-03"), CEILINGS, [row("flex", 1.0), row("sdpa cudnn", 1.0)], name="a"
    )
    second = Results(machine(date="2001-02-04"), None, [row("flex", 2.0)], name="b")
    other = Results(machine(versions={"torch": "9"}), None, [row("flex", 3.0)], name="c")
    one, two = gather([first, second, other])
    assert (one.files, one.days, one.repeated) == (["a", "b"], "2001-02-03 to 2001-02-04", 1)
    assert {r.implementation: r.median for r in one.rows} == {"flex": 2.0, "sdpa cudnn": 1.0}
    assert one.ceilings is CEILINGS and two.rows[0].median == 3.0
    assert "revision 0123456789ab," in one.made_with


def test_summary_names_what_is_wrong_and_what_failed():
    bad = section(
        [row("flex", 1.0, status="wrong", reason="error [bold]1[/bold]"), row("tilewise portable", 1.0)]
    )
    bad.checks += [Check("graph", "right", 1.0), Check("large", "wrong", 1.0, "off\nby one")]
    bad.checks += [Check("hopper: x", "left out", 0.0, "why"), Check("y", "not applicable", 0.0)]
    lines = status_lines(bad)
    assert lines[0] == "2 rows: 1 wrong, 1 ok"
    assert lines[1] == "flex: wrong in every case: error [bold]1[/bold]"
    assert lines[2:] == [
        "1 of 2 checks passed",
        "wrong: large: off by one",
        "1 check left out: why",
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary([bad], console)
    assert "error [bold]1[/bold]" in console.export_text()


def test_page_of_a_cpu_says_so_and_names_no_ratio(tmp_path):
    rows = [row("tilewise portable", 1.0, error=1e-3, torch_error=1e-3), row("sdpa math", 2.0)]
    text = write_report([section(rows, gpu=None)], tmp_path).read_text()
    assert f"**{NO_SPEED}**" in text and "fastest rival, geometric" not in text and "0.50×" not in text
    pictures = {path.name for path in tmp_path.iterdir()}
    assert {"cpu-models-forward-bars.png", "cpu-models-forward-errors.svg"} <= pictures
    assert all(f"({name})" in text for name in pictures - {"report.md"})


def test_report_command_reads_both_kinds_of_file(tmp_path):
    lines, pytests = tmp_path / "lines.jsonl", tmp_path / "pytest.json"
    append(lines, machine(), CEILINGS, row("tilewise portable", 1e-3, flops=10**9))
    benchmark = {"extra_info": {"row": vars(row("sdpa cudnn", 2e-3, flops=10**9))}}
    info = {"tilewise": {"machine": vars(machine())}}
    pytests.write_text(json.dumps({"machine_info": info, "benchmarks": [benchmark, {"extra_info": {}}]}))
    assert load(pytests).rows[0].implementation == "sdpa cudnn"
    out = tmp_path / "out"
    ran = CliRunner().invoke(build_app("report"), ["report", str(lines), str(pytests), "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "2.00×" in ran.output and "2 rows: 2 ok" in ran.output
    assert (out / "report.md").read_text().count("## NVIDIA H200") == 1


def test_report_command_refuses_what_is_no_result(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"kind": "poem"}')
    ran = CliRunner().invoke(build_app("report"), ["report", str(path)])
    assert ran.exit_code == 2 and "kind 'poem'" in ran.output and "Traceback" not in ran.output


def test_missing_package_is_one_line():
    assert "pip install 'tilewise[bench]'" in what_to_install(ModuleNotFoundError(name="tabulate"))
    assert "PYTHONPATH=kernels:reference" in what_to_install(ModuleNotFoundError(name="tilewise"))
    with pytest.raises(ModuleNotFoundError):
        what_to_install(ModuleNotFoundError(name="bench.nothing"))


def test_report_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; import bench.report.commands"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_readme_and_goals_are_up_to_date():
    for path, text in filled(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date; run: python -m bench readme"


def test_readme_says_what_the_committed_results_say(tmp_path):
    assert performance([]) == NOTHING and "Nothing is said about speed" in NOTHING
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text("<!-- goals:begin --><!-- goals:end -->")
    (tmp_path / "README.md").write_text(
        "before <!-- performance:begin -->stale text<!-- performance:end --> after"
    )
    append(tmp_path / "bench/measured/h200.jsonl", machine(), row("tilewise portable", 1.0), row("flex", 2.0))
    text = filled(tmp_path)[tmp_path / "README.md"]
    assert "stale text" not in text and text.startswith("before <!--") and text.endswith("--> after")
    assert "**NVIDIA H200**: torch 1.2.3, triton 4.5.6, driver 580, revision 0123456789ab, 2001-02-03" in text
    assert "2.00×" in text and "(bench/measured/h200.jsonl)" in text
    append(tmp_path / "bench/measured/laptop.jsonl", machine(gpu=None), row("tilewise portable", 1.0))
    with pytest.raises(ValueError, match="laptop: made without a GPU"):
        filled(tmp_path)


def test_geometric_mean_is_not_the_arithmetic():
    rows = [row("tilewise portable", 1.0, case) for case in "ab"] + [
        row("flex", 4.0, "a"),
        row("flex", 9.0, "b"),
    ]
    assert standings(rows)[0].mean == pytest.approx(math.sqrt(4.0 * 9.0))
