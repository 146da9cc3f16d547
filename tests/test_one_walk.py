"""The backward in one walk: the gradients of two, and the same bits in whatever order programs start."""

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import build, judge
from harness.problem import SMALL, run
from tilewise import Causal, Padding
from tilewise.kernels.tile import Tile
from tilewise.kernels.turns import rank_of, take_turn
from tilewise.kernels.walk import row_steps, row_tile
from tilewise.parts.intervals import q_range
from tilewise.plan import passes

pytestmark = pytest.mark.oldest
INTERPRETED = triton.knobs.runtime.interpret


@pytest.fixture(autouse=True)
def walked(monkeypatch):
    """Every backward goes in one walk; the list has an entry for each."""
    found: list[Any] = []
    launch = passes.launch_dqkv

    def counted(*arguments: Any) -> None:
        found.append(arguments)
        launch(*arguments)

    monkeypatch.setattr(passes, "launch_dqkv", counted)
    with tilewise.tiles.use_walks(1):
        yield found


# ---- Against float64

# Each mask, score, layout and whatever else the kernel is told of, in few calls.
CALLS = (
    ("causal", "float16", "softcap"),
    ("window", "bfloat16", "bias", "odd_dims"),
    ("causal", "window", "float32", "sink"),
    ("documents", "float32", "dropout", "transposed_layout"),
    ("scattered_documents", "bfloat16"),
    ("intervals", "bfloat16", "alibi", "one_kv_head"),
    ("user_interval", "float16", "cosine"),
    ("packed_apart", "causal", "float32"),
    ("packed_rows", "cosine_with_temperature", "bfloat16"),
    ("left_padding", "float32", "relative_position", "inner_strided_layout"),
    ("bool_mask", "prefix", "float16", "user_score"),
    ("float32", "fewer_keys", "oblong_tile", "value_dim_differs"),
    ("float32", "no_query"),
    ("float32", "no_key"),
)


@pytest.mark.parametrize("features", CALLS, ids=" ".join)
def test_gradients(device, walked, features):
    run(device, *features, seed=features, backward=True, **SMALL)
    assert walked


@pytest.mark.parametrize("tile", [Tile(32, 16), Tile(16, 32)], ids=str)
@pytest.mark.parametrize("pair", [(33, 33), (19, 50), (50, 19)], ids=str)
def test_tiles_need_not_be_square(device, walked, pair, tile):
    p = build(device, random.Random(0), [], batch=1, q_len=pair[0], kv_len=pair[1], tile=tile)
    p.mask = Causal("bottom_right") & tilewise.Window(20, 0, "bottom_right")
    judge(p, backward=True)
    assert walked


def test_columns_in_pieces(device, walked):
    """head_dim 80 is 16 + 64 columns; 40 is 64, of which 24 are padding."""
    for head_dim in (80, 40):
        p = build(device, random.Random(0), [], batch=1, q_len=20, kv_len=20, head_dim=head_dim)
        judge(p, backward=True)
    assert len(walked) == 2


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf], ids=str)
def test_what_no_query_sees_has_no_influence(device, similarity, junk):
    """Keys behind the padding lie in a tile that is visited, and so do they for rows before all of it."""
    q, k, v = (torch.randn(1, 2, 40, 16, device=device) for _ in range(3))
    do = torch.randn_like(q)

    def gradients(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with tilewise.tiles.use(Tile(16, 32)):
            given = dict(mask=Causal() & Padding(27), similarity=similarity, impl="portable")
            return torch.autograd.grad(tilewise.attention(*leaves, **given), leaves, do)

    clean = gradients(k, v)
    k[:, :, 27:], v[:, :, 27:] = junk, junk
    assert all(torch.equal(a, b) for a, b in zip(gradients(k, v), clean, strict=True))


# ---- The order


def some_call(device: torch.device) -> tuple[torch.Tensor, ...]:
    """dQ, dK and dV of a call in which up to three tiles of keys add to one of dQ."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, do = (torch.randn(1, 4, 50, 16, generator=generator).to(device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k[:, :2], v[:, :2])]
    with tilewise.tiles.use(Tile(16, 16)):
        mask = Causal() & tilewise.Window(30, 0)
        return torch.autograd.grad(tilewise.attention(*leaves, mask=mask, impl="portable"), leaves, do)


@pytest.fixture
def start_order(monkeypatch):
    """start_order(rearranged): the interpreter runs the programs of a launch in this order."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def choose(rearranged: Any) -> None:
        def moved(x: int, y: int, z: int) -> None:
            set_grid_idx(rearranged(range(builder.grid_dim[0]))[x], y, z)

        monkeypatch.setattr(builder, "set_grid_idx", moved)

    return choose


def shuffled(programs: range) -> list[int]:
    return random.Random(3).sample(programs, len(programs))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU nobody chooses who starts first")
@pytest.mark.parametrize("rearranged", [lambda programs: programs[::-1], shuffled], ids=["last first", "any"])
def test_bits_do_not_depend_on_who_starts_first(device, start_order, rearranged):
    first = some_call(device)
    start_order(rearranged)
    assert all(torch.equal(a, b) for a, b in zip(some_call(device), first, strict=True))


@triton.jit
def waiting_kernel(turns_ptr, rank):
    take_turn(turns_ptr + 2, rank, turns_ptr + 1)


@pytest.mark.skipif(not INTERPRETED, reason="a program that waits for nobody would hang there")
def test_nobody_waits_for_ever_in_the_interpreter(device):
    turns = torch.zeros(3, dtype=torch.int32, device=device)
    waiting_kernel[(1,)](turns, 0)
    with pytest.raises(Exception, match="waits for ever"):
        waiting_kernel[(1,)](turns, 1)


@triton.jit
def order_kernel(ranges_ptr, q_tiles, visits_ptr, ranks_ptr, TILE_KV: tl.constexpr, MOST: tl.constexpr):
    """For each tile of keys, a program: the tiles of rows it adds to, in its order, and its rank at each."""
    kv_tile = tl.program_id(0)
    kv_start = kv_tile * TILE_KV
    span = q_range(ranges_ptr, q_tiles, kv_start, kv_start + TILE_KV, 128)
    place = kv_tile * MOST
    for half in range(2):
        for RUN in tl.static_range(2):
            for step in range(row_steps(span, half, RUN != 1, True)):
                tile = row_tile(step, span, half, RUN != 1, True)
                start, stop = tl.load(ranges_ptr + tile * 4), tl.load(ranges_ptr + tile * 4 + 1)
                visits, rank = rank_of(start, stop, kv_tile, TILE_KV)
                tl.store(visits_ptr + place, tl.where(visits, tile, -1))
                tl.store(ranks_ptr + place, rank)
                place += 1


def orders(ranges: list[list[int]], kv_len: int, device: torch.device) -> list[list[tuple[int, int]]]:
    """What each program does: (tile of rows, rank) in its order."""
    kv_tiles, most = -(-kv_len // 16), len(ranges)
    visits = torch.full((kv_tiles, most), -1, dtype=torch.int32, device=device)
    ranks = torch.full_like(visits, -1)
    given = torch.tensor(ranges, dtype=torch.int32, device=device)
    order_kernel[(kv_tiles,)](given, len(ranges), visits, ranks, TILE_KV=16, MOST=most)
    pairs = zip(visits.tolist(), ranks.tolist(), strict=True)
    return [[(m, r) for m, r in zip(*pair, strict=True) if m >= 0] for pair in pairs]


def simulated(programs: list[list[tuple[int, int]]], tiles: int, places: int, rng: random.Random):
    """Run the programs, `places` at once, the lowest numbers first and each as fast as chance has it, or all
    equally fast without chance. Returns who added to each tile of rows, and in how many rounds."""
    counters, added = [0] * tiles, [[] for _ in range(tiles)]
    waiting, running = list(range(len(programs))), []
    rounds = 0
    while waiting or running:
        while waiting and len(running) < places:
            running.append([waiting.pop(0), 0, None])  # number, steps done, the turn to be passed on
        rounds += 1
        moved = False
        for program in sorted(running, key=lambda _: rng.random()) if rng else running[::-1]:
            number, done, before = program
            if before is not None:
                counters[before] += 1
                program[2] = None
            if done == len(programs[number]):
                running.remove(program)
                moved = True
                continue
            tile, rank = programs[number][done]
            if counters[tile] == rank and not (rng and rng.random() < 0.3):
                added[tile].append(number)
                program[1:] = [done + 1, tile]
                moved = True
            moved = moved or before is not None or bool(rng)
        assert moved, "everybody waits"
        assert rounds < 100_000, "somebody waits for ever"
    return added, rounds


def causal_ranges(tiles: int, window: int | None = None) -> list[list[int]]:
    """What prepare writes of a causal mask with tiles of 16 rows, and of a window."""
    found = []
    for tile in range(tiles):
        first, last = tile * 16, tile * 16 + 15
        start, full_start = (0, 0) if window is None else (max(0, first - window), max(0, last - window))
        found.append([start, last + 1, full_start, first + 1])
    return found


def any_ranges(rng: random.Random, tiles: int) -> list[list[int]]:
    """Rows that visit keys as a function of the user's may have it; some none."""
    found = []
    for _ in range(tiles):
        start = rng.randrange(tiles * 16)
        stop = rng.choice((0, rng.randint(start + 1, tiles * 16), (start // 16 + rng.randint(1, 3)) * 16))
        stop = min(stop, tiles * 16)
        full_start = rng.randint(start, max(start, stop))
        found.append([start if stop else tiles * 16, stop, full_start, rng.randint(0, stop)])
    return found


@pytest.mark.parametrize("places", [1, 3, 100])
@pytest.mark.parametrize("kind", ["full", "causal", "window", "any"])
def test_each_tile_of_rows_is_added_to_in_the_order_of_keys(device, kind, places):
    tiles, rng = 30 if kind == "any" else 12, random.Random(f"{kind} {places}")
    ranges = {
        "full": [[0, tiles * 16, 0, tiles * 16]] * tiles,
        "causal": causal_ranges(tiles),
        "window": causal_ranges(tiles, 40),
        "any": any_ranges(rng, tiles),
    }[kind]
    programs = orders(ranges, tiles * 16, device)
    added, _ = simulated(programs, tiles, places, rng)
    wanted = [list(range(start // 16, -(-stop // 16))) for start, stop, _, _ in ranges]
    assert added == wanted


@pytest.mark.parametrize("window", [None, 200], ids=str)
def test_programs_wait_once_and_not_at_every_step(device, window):
    """All of a head at once: each starts two rounds behind the one before, which costs as many rounds as the
    longest walk has steps, once. With rows from the first to the last it would be thrice that."""
    tiles = 60
    programs = orders(causal_ranges(tiles, window), tiles * 16, device)
    _, rounds = simulated(programs, tiles, tiles, None)
    assert rounds <= 2 * max(map(len, programs)) + 2
