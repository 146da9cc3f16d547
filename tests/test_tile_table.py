"""The tables of tiles: the one that ships, the user's own for a GPU, and which of them a call goes by."""

import contextlib
import itertools
import json
import re
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from tilewise.kernels.tile import PASSES, HopperTile, Tile, describe
from tilewise.parts.shape import Shape
from tilewise.plan import tiles, user_tiles
from tilewise.plan.tile_table import DIMS, SHIPPED, Evidence, Row, load, save

GPU, ARCH = "NVIDIA H200", "sm_90"
SHAPE = Shape(1, 8, 8, 4096, 4096, 128, 128)
TUNED = Tile(64, 32, num_warps=4, num_stages=3)


def row(work="forward", tile=TUNED, arch=ARCH, dim=128, **evidence):
    known = dict(triton=triton.__version__, gpu=GPU, kernels=user_tiles.kernels_hash())
    return Row(work, arch, 2, dim, tile, Evidence(**known | evidence))


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs that are not there: 0 is an H200, 1 an RTX 4090; their tables are in tmp_path."""
    names = {0: (GPU, ARCH), 1: ("NVIDIA GeForce RTX 4090", "sm_89")}
    monkeypatch.setenv("TILEWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "architecture", lambda device: names[device.index][1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index][0])
    tiles.reload_user_tables()
    yield
    tiles.reload_user_tables()


def q_on(index: int):
    return SimpleNamespace(device=torch.device("cuda", index), element_size=lambda: 2)


def choice(index=0, work="forward", shape=SHAPE):
    tile, source = tiles.tile_choice(q_on(index), shape, work)
    assert tile == tiles.choose_tile(q_on(index), shape, work)
    return tile, source


# ---- The table that ships


def test_shipped_table_has_a_row_for_every_pass_family_width_and_dimension():
    rows = load(SHIPPED)
    families = ("sm_80", "sm_90", "sm_100", "gfx942")
    wanted = itertools.product(PASSES, families, (2, 4), DIMS)
    assert {*rows} >= {key for key in wanted if tiles.has_tile(*key[2:], key[0])}
    assert ("dqkv", "sm_90", 4, 256) not in rows
    with pytest.raises(NotImplementedError, match="take two walks"):
        tiles.table_tile("sm_90", 4, 256, "dqkv")
    assert {key: each.tile for key, each in rows.items()} == tiles.TABLE
    assert all(
        each.evidence.triton and each.evidence.registers and each.evidence.shared_bytes
        for each in rows.values()
    )


def test_shipped_file_is_as_save_writes_it(tmp_path):
    """One row a line: a change of a row is a change of a line."""
    save(tmp_path / "copy.json", load(SHIPPED).values())
    assert (tmp_path / "copy.json").read_text() == SHIPPED.read_text()
    assert len(SHIPPED.read_text().splitlines()) == len(tiles.TABLE) + 2


def test_a_row_of_the_chip_itself_goes_before_that_of_its_family(monkeypatch):
    monkeypatch.setitem(tiles.TABLE, ("forward", "sm_89", 2, 128), TUNED)
    tiles.table_tile.cache_clear()
    try:
        assert tiles.table_tile("sm_89", 2, 128) == TUNED
        assert tiles.table_tile("sm_86", 2, 128) != TUNED
    finally:
        monkeypatch.undo()
        tiles.table_tile.cache_clear()


# ---- The file


def test_what_is_saved_is_loaded(tmp_path):
    full = row(
        registers=200, shared_bytes=65536, milliseconds={"a": 1.5}, before={"a": 2.0}, before_tile="x",
        gain=1.3, samples=90, error=0.4, torch="2.11", driver="580.1", date="2026-11-24T00:00:00+00:00",
    )  # fmt: skip
    three = HopperTile(192, 64, 12, 2, has_turns=False, is_q_in_registers=True)
    hopper = Row("hopper", "sm_90", 2, 64, three, Evidence("3.9.0", gpu="H200", error=0.5, over_portable=1.2))
    rows = [full, row("dq", dim=64), row(gpu=None, arch="gfx942"), hopper]
    path = tmp_path / "new" / "table.json"
    save(path, rows)
    assert list(load(path).values()) == rows
    save(path, [])
    assert load(path) == {}


def changed(of="forward", **changes):
    rows = json.loads(SHIPPED.read_text())["rows"]
    given = next(each for each in rows if each["pass"] == of)
    return {name: value for name, value in (given | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no table of tiles"),
        ("[]", "must hold an object of format and rows"),
        ('{"format": 7, "rows": []}', r"format=7; this version of tilewise reads 1"),
        (changed(tile_q=48), r"row 1: tile_q=48 must be a power of two"),
        (changed(num_warps=3), r"row 1: num_warps=3 must be a power of two from 1 to 32"),
        (changed(num_stages=0), r"row 1: num_stages=0 must be from 1 to 8"),
        (changed(dim=100), r"row 1: dim=100 must be one of 64, 96, 128, 160, 192, 256, 576"),
        ({**changed(), "pass": "sideways"}, r"pass='sideways' must be one of forward, dkv, dq"),
        (changed(of="hopper", tile_q=64), r"row 1: tile_q=64 must be 128 or 192"),
        (changed(of="hopper", tile_kv=512), r"row 1: tile_kv=512 must be a power of two from 16 to 256"),
        (changed(of="hopper", num_warps=4), r"row 1: num_warps=4 must be 8 where .*tile_q=128"),
        (changed(of="hopper", num_stages=5), r"row 1: num_stages=5 must be from 1 to 4"),
        (changed(of="hopper", has_turns=1), r"row 1: has_turns=1 must be bool"),
        (changed(of="hopper", has_turns=...), r"row 1: a row lacks has_turns"),
        (changed(has_turns=True), r"row 1: a row has no field has_turns"),
        (changed(tile_kv="64"), r"row 1: tile_kv='64' must be int"),
        (changed(tile_kv=True), r"row 1: tile_kv=True must be int"),
        (changed(evidence=...), r"row 1: a row lacks evidence"),
        (changed(colour="red"), r"row 1: a row has no field colour"),
        (changed(evidence={}), r"row 1: evidence lacks triton"),
        (changed(evidence={"triton": "3.9.0", "gain": "x"}), r"row 1: gain='x' must be a number"),
        (changed(evidence={"triton": "3", "before": {"a": 0}}), r"before\['a'\]=0 must be a positive number"),
    ],
)
def test_a_broken_file_says_what_is_wrong_with_it(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"format": 1, "rows": [text]}))
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_two_rows_for_the_same_calls_are_refused(tmp_path):
    save(tmp_path / "table.json", [row(), replace(row(), tile=Tile(16, 16))])
    with pytest.raises(ValueError, match=r"row 2: a second row for \('forward', 'sm_90', 2, 128\)"):
        load(tmp_path / "table.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    save(path, [row()])
    before = path.read_text()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save(path, [])
    assert path.read_text() == before and [*tmp_path.iterdir()] == [path]


# ---- Whose tile a call gets


def test_without_a_table_of_ones_own_the_shipped_one_holds(gpus):
    assert choice() == (tiles.gpu_tile(ARCH, 2, SHAPE), "shipped table")
    assert choice(1) == (tiles.gpu_tile("sm_89", 2, SHAPE), "shipped table")


def test_ones_own_rows_override_the_shipped_ones_on_their_gpu_alone(gpus, tmp_path):
    path = user_tiles.table_path(GPU)
    assert path == tmp_path / "tiles" / "nvidia-h200.json"
    save(path, [row()])
    assert choice() == (TUNED, f"your table ({path})")
    assert choice(0, "dq")[1] == choice(1)[1] == "shipped table"
    # The rest of the rule stays: dimensions up to the next row's, and fewer rows for short queries.
    assert choice(shape=SHAPE._replace(head_dim=72))[0] == TUNED
    assert choice(shape=SHAPE._replace(head_dim=64, value_dim=64))[1] == "shipped table"
    assert choice(shape=SHAPE._replace(q_len=20))[0] == replace(TUNED, tile_q=32)


def test_the_row_for_64_serves_narrower_heads(gpus):
    save(user_tiles.table_path(GPU), [row(dim=64)])
    assert choice(shape=SHAPE._replace(head_dim=16, value_dim=16))[0] == TUNED


@pytest.mark.parametrize(
    "stale, reason",
    [
        (row(triton="2.0.0"), rf"tuned with Triton 2.0.0, and {triton.__version__} runs"),
        (row(kernels="0123456789ab"), "tuned with another version of tilewise's kernels"),
        (row(gpu="NVIDIA H100"), r"tuned on NVIDIA H100 \(sm_90\), and this is NVIDIA H200 \(sm_90\)"),
        (row(arch="sm_80"), r"tuned on NVIDIA H200 \(sm_80\)"),
        (row(tile=Tile(256, 256)), "too large for sm_90"),
    ],
)
def test_a_row_that_was_tuned_for_something_else_is_not_applied(gpus, stale, reason):
    save(user_tiles.table_path(GPU), [stale, row("dq")])
    table = tiles.user_table(torch.device("cuda", 0))
    assert choice()[1] == "shipped table" and choice(0, "dq")[1].startswith("your table")
    ((refused, why),) = table.refused
    assert refused == stale and re.match(reason, why)


def test_a_broken_table_of_ones_own_is_no_silent_matter(gpus):
    path = user_tiles.table_path(GPU)
    path.parent.mkdir()
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="tiles tuned for NVIDIA H200 cannot be read") as raised:
        choice()
    assert f"Delete {path}" in str(raised.value) and "tilewise tune --forget" in str(raised.value)


def test_the_file_is_read_once(gpus, monkeypatch):
    read = []
    load_file = user_tiles.load
    monkeypatch.setattr(user_tiles, "load", lambda path: read.append(path) or load_file(path))
    for _ in range(3):
        choice(), choice(0, "dkv")
    assert len(read) == 1


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"TILEWISE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tilewise"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/someone/.cache/tilewise"),
        ({}, "/home/someone/.cache/tilewise"),
    ],
)
def test_where_the_tables_are(monkeypatch, environment, folder):
    for name in ("TILEWISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(user_tiles.cache_folder()) == folder


def test_a_changed_kernel_changes_the_hash(monkeypatch, tmp_path):
    """And a changed rule for tiles does not: the tile of a row is what was timed."""
    package = tmp_path / "tilewise"
    shutil.copytree(user_tiles.Path(user_tiles.__file__).parents[1], package)
    monkeypatch.setattr(user_tiles, "__file__", str(package / "plan/user_tiles.py"))
    compute = user_tiles.kernels_hash.__wrapped__
    assert compute() == user_tiles.kernels_hash()
    for name, changes in (
        ("plan/tiles.py", False), ("parts/softmax.py", True), ("parts/masks/causal.py", True),
        ("kernels/call.py", True), ("kernels/hopper/consumer.py", True), ("kernels/hopper/plan.py", True),
        ("kernels/hopper/launch.py", True), ("plan/rules/hopper.py", False),
    ):  # fmt: skip
        before = compute()
        with (package / name).open("a") as file:
            file.write("\n")
        assert (compute() != before) == changes, name


# ---- tiles.use


def test_use_gives_every_pass_its_tile_or_the_named_ones(gpus):
    save(user_tiles.table_path(GPU), [row()])
    forced, other = Tile(16, 16), Tile(32, 16)
    with tiles.use(forced):
        assert [choice(0, work) for work in PASSES] == [(forced, "given by tiles.use")] * len(PASSES)
        with tiles.use(other, ("dq",)):
            assert {work: choice(0, work)[0] for work in PASSES} == dict.fromkeys(PASSES, forced) | {
                "dq": other
            }
        assert choice(0, "dq")[0] == forced
    with tiles.use(forced, passes=["dkv"]), contextlib.suppress(KeyError):
        assert choice(0, "dkv")[0] == forced and choice()[0] == TUNED
        raise KeyError
    assert choice(0, "dkv")[1] == "shipped table"


def test_use_reaches_a_backward_in_another_thread(device):
    """As PyTorch runs it on a GPU; here a thread stands in for PyTorch's."""
    seen = []
    q = torch.randn(1, 1, 20, 16, device=device)
    thread = threading.Thread(
        target=lambda: seen.append(tiles.choose_tile(q, Shape(1, 1, 1, 20, 20, 16, 16), "dq"))
    )
    with tiles.use(Tile(16, 32)):
        thread.start()
        thread.join()
    assert seen == [Tile(16, 32)]


def test_the_interpreters_tile_says_so(device):
    if device.type != "cpu":
        pytest.skip("the kernels run compiled")
    q = torch.randn(1, 1, 20, 16)
    assert tiles.tile_choice(q, Shape(1, 1, 1, 20, 20, 16, 16), "dq") == (Tile(32, 32), "interpreter")


def test_a_chip_by_name_gets_the_shipped_tile():
    shipped = tiles.gpu_tile("sm_90", 2, SHAPE, "dkv")
    assert tiles.arch_choice("sm_90", 2, SHAPE, "dkv") == (shipped, "shipped table")
    with tiles.use(TUNED):
        assert tiles.arch_choice("sm_90", 2, SHAPE, "dkv") == (TUNED, "given by tiles.use")


def test_a_tile_in_words():
    assert describe(Tile(128, 64, 8, 2)) == "128 x 64, 8 warps, 2 stages"
    assert describe(Tile(16, 16, 1, 1)) == "16 x 16, 1 warp, 1 stage"
    assert describe(HopperTile(128, 64, 8, 2)) == "128 x 64, 8 warps, 2 stages, in turns"
    both = HopperTile(192, 64, 12, 1, has_turns=False, is_q_in_registers=True)
    assert describe(both) == "192 x 64, 12 warps, 1 stage, Q in registers"
    wide = HopperTile(128, 64, 8, 2, has_turns=False, producer_warps=4)
    assert describe(wide) == "128 x 64, 8 warps, 2 stages, 4 producer warps"
