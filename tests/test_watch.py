"""`tilewise watch`: what is recorded of a call is what its kernels computed, where, and from which memory."""

import ast
import json

import numpy as np
import pytest
import torch

import tilewise
import tilewise_reference
from harness.gluon import needs_interpreter
from harness.watched import CALLS, TILE, dense, last, memory, moments, odd_pairs, packed, paged, recorded
from tilewise.kernels.tile import Tile
from tilewise.plan import tiles
from tilewise.plan.request import request_of
from tilewise.tools.explain.coverage import STATES, rows_of, tile_states
from tilewise.tools.watch.record import is_decodable
from tilewise.tools.watch.recording import MOST_BYTES, Arrays, TooLarge
from tilewise.tools.watch.telling import TELLINGS, tellings_in
from tilewise.tools.watch.tracer import PACKAGE
from tilewise_reference.yardstick import allowed_error, largest_difference, pytorch_attention

pytestmark = needs_interpreter
MASK = tilewise.Causal() & tilewise.Window(20, 0)
LETTERS = dict(zip(STATES, ".%#", strict=True))


@pytest.fixture(scope="module")
def request_():
    return dense(mask=MASK)


@pytest.fixture(scope="module")
def recording(request_):
    return recorded(request_)


@pytest.fixture(scope="module")
def walks(recording):
    return {walk.name: walk for walk in recording.passes}


@pytest.fixture(scope="module")
def kinds():
    """A recording of each kind of call."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = recorded(CALLS[name]())
        return made[name]

    return make


# ---- The numbers


def test_watching_changes_nothing(request_, recording):
    with tiles.use(TILE):
        out, lse = tilewise.attention(request_.q, request_.k, request_.v, mask=MASK, return_lse=True)
    assert np.array_equal(recording.arrays[recording.tensors["out"]], out[0, 1].numpy())
    assert np.array_equal(recording.arrays[recording.tensors["lse"]], lse[0, 1].numpy())


@pytest.mark.parametrize("name", CALLS)
def test_every_program_ends_with_its_rows_of_the_output(kinds, name):
    found = kinds(name)
    walk = next(walk for walk in found.passes if walk.name in ("forward", "combine"))
    out = found.arrays[(walk.tensors or found.tensors)["out"]]
    seen = []
    for program in walk.programs:
        first, stop = program.owns
        assert first < stop
        assert np.array_equal(last(found, program, "o")[: stop - first], out[first:stop])
        seen += range(first, stop)
    assert sorted(seen) == list(range(len(out))), "each row is somebody's"


@pytest.mark.parametrize("name", [name for name in CALLS if name != "paged"])
def test_every_program_ends_with_its_rows_of_a_gradient(kinds, name):
    found = kinds(name)
    for walk, grads in (("dkv", ("dk", "dv")), ("dq", ("dq",))):
        (backward,) = (each for each in found.passes if each.name == walk)
        for grad in grads:
            whole = found.arrays[found.tensors[grad]]
            for program in backward.programs:
                first, stop = program.owns
                assert np.array_equal(last(found, program, grad)[: stop - first], whole[first:stop]), grad


def test_the_steps_add_up_to_the_weights_of_attention(request_, recording, walks):
    """Of each tile's P all later factors, and the division at the end."""
    q, k, v = request_.q[:, 1:], request_.k, torch.eye(37)[None, None]
    keep = [tilewise_reference.masks.causal(37, 37), tilewise_reference.masks.window(20, 0, 37, 37)]
    exact = tilewise_reference.attention(q, k, v, mask=keep, dtype=torch.float64)[0, 0]
    theirs = largest_difference(pytorch_attention(q, k, v, mask=keep)[0][0, 0], exact)
    weights = np.zeros((37, 37), np.float32)
    for program in walks["forward"].programs:
        own = slice(*program.owns)
        for stage in program.stages:
            sets = {
                name: recording.arrays[at] for moment in stage.moments for name, at in moment.sets.items()
            }
            rows = own.stop - own.start
            if stage.kind == "step":
                weights[own] *= sets["rescale"][:rows, None]
                keys = slice(16 * stage.tile[1], min(16 * stage.tile[1] + 16, 37))
                weights[own, keys] = sets["p"][:rows, : keys.stop - keys.start]
            elif stage.kind == "end":
                weights[own] *= sets["factor"][:rows, None]
    got = torch.from_numpy(weights)
    assert bool(((got.double() - exact).abs() <= allowed_error(exact, torch.float32, theirs)).all())
    compared = torch.from_numpy(recording.arrays[recording.compare.mask[0].weights])
    assert bool(((compared.double() - exact).abs() <= allowed_error(exact, torch.float32, theirs)).all())


def test_scores_are_the_products_of_the_tiles_beside_them(recording, walks):
    for program in walks["forward"].programs:
        q = last(recording, program, "q").astype(np.float64)
        for stage in program.stages:
            sets = {}
            for moment in stage.moments:
                sets |= moment.sets
                if moment.equation == "S = Q Kᵀ":
                    k = recording.arrays[sets["k"]].astype(np.float64)
                    s = recording.arrays[moment.sets["s"]]
                    assert (np.abs(s - q @ k.T) <= np.spacing(np.abs(s))).all()


# ---- Where, and from which memory


@pytest.mark.parametrize("walk, tensors", [("forward", "qkv"), ("dkv", "qkv"), ("dq", "qkv")])
def test_loads_name_the_bytes_that_were_read(request_, recording, walks, walk, tensors):
    found = 0
    for _, _, moment in moments(walks[walk]):
        for load in moment.loads:
            if load.tensor not in tensors:  # dO is gone by now
                continue
            tile = recording.arrays[moment.sets[load.tensor]]
            source = getattr(request_, load.tensor)
            for row, offset in zip(tile, recording.arrays[load.rows].tolist(), strict=True):
                read = np.zeros(len(row)) if offset < 0 else memory(source, offset, len(row), load.column)
                assert np.array_equal(row, read)
                found += offset >= 0
    assert found > 100


def test_rows_in_pages_are_read_where_the_pages_are(kinds):
    found, request = kinds("paged"), paged()
    for _, _, moment in moments(found.passes[0]):
        for load in moment.loads:
            source = request.q if load.tensor == "q" else getattr(request, load.tensor)
            for row, offset in zip(
                found.arrays[moment.sets[load.tensor]], found.arrays[load.rows], strict=True
            ):
                read = (
                    np.zeros(len(row)) if offset < 0 else memory(source, int(offset), len(row), load.column)
                )
                assert np.array_equal(row, read)


def test_rows_in_pages_are_the_tensors_that_are_shown(kinds):
    found, request = kinds("paged"), paged()
    whole = torch.cat([request.k[page, 0] for page in (2, 3, 1)])  # [pages, heads, rows, dim]
    assert np.array_equal(found.arrays[found.tensors["k"]], whole[:45].numpy())


def test_stores_name_the_bytes_of_the_output(recording, walks):
    places = {"out": (2, 37, 40), "dq": (2, 37, 24), "dk": (1, 37, 24), "dv": (1, 37, 40)}  # heads, rows, dim
    seen = {name: [] for name in places}
    for walk in ("forward", "dkv", "dq"):
        for program, _, moment in moments(walks[walk]):
            for store in moment.stores:
                heads, rows, dim = places[store.tensor]
                begin = ((heads - 1) * rows + program.owns[0]) * dim * 4  # of the last head
                offsets = recording.arrays[store.rows]
                count = program.owns[1] - program.owns[0]
                assert offsets[:count].tolist() == [begin + row * dim * 4 for row in range(count)]
                assert (offsets[count:] == -1).all() and store.column == 4
                seen[store.tensor] += range(*program.owns)
    assert all(sorted(rows) == list(range(37)) for rows in seen.values())


def test_grids_are_those_that_explain_counts(request_, walks):
    states = tile_states(rows_of(request_.masks, request_.shape), request_.shape, 16, 16)[0, 0]
    expected = ["".join(LETTERS[STATES[state]] for state in row) for row in states.tolist()]
    assert {".", "%"} <= set("".join(expected))
    assert walks["forward"].grid == walks["dq"].grid == expected
    visited = [[letter != "." for letter in row] for row in walks["dkv"].grid]
    assert visited == [[letter != "." for letter in row] for row in expected]


def test_a_moment_names_the_statement_that_set_its_variables(recording):
    for walk in recording.passes:
        for _, _, moment in moments(walk):
            lines = (PACKAGE / moment.file).read_text().splitlines()[moment.lines[0] - 1 : moment.lines[1]]
            (statement,) = ast.parse(
                "\n".join(line.strip() if n == 0 else line for n, line in enumerate(lines))
            ).body
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)
                     and isinstance(node.ctx, ast.Store)}  # fmt: skip
            assert set(moment.sets) <= names
            assert moment.sets or moment.note


@pytest.mark.parametrize("name", CALLS)
def test_something_is_said_of_every_statement(kinds, name):
    unsaid = {
        (moment.file, moment.lines, tuple(moment.sets))
        for walk in kinds(name).passes
        for _, _, moment in moments(walk)
        if not moment.note
    }
    assert unsaid == set()


def test_what_is_said_is_of_statements_that_are_there():
    assert all(tellings_in(file) for file, _ in TELLINGS)


# ---- Decoding and Hopper


def test_split_keys_are_walked_by_as_many_programs_and_merged(kinds):
    found = kinds("paged")
    splits, combine = found.passes
    assert {program.split for program in splits.programs} == {0, 1}
    assert splits.lengths == (6, 45) == combine.lengths, "3 rows of each of 2 heads against the keys in use"
    for program in splits.programs:
        columns = [stage.tile[1] for stage in program.stages if stage.kind == "step"]
        assert columns and all(column // 2 == program.split for column in columns), "32 keys a split"


def test_a_text_is_followed_by_a_step_of_decoding(recording):
    assert recorded(dense(33, 33, (2, 2), mask=tilewise.Causal())).passes[3].words["queries"] == [
        "29",
        "30",
        "31",
        "32",
    ]
    assert "splits" in recording.omitted and "splits" not in {walk.name for walk in recording.passes}


def test_decoding_follows_what_it_would_repeat():
    causal = tilewise.Causal()
    assert is_decodable(dense(33, 33, mask=causal))
    others = [
        dense(33, 33),
        dense(33, 33, mask=tilewise.Window(5, 0)),
        dense(33, 33, mask=MASK),
        dense(17, 33, mask=causal),
        dense(20, 20, mask=causal),
        dense(33, 33, mask=causal, score=tilewise.Softcap(3.0)),
        dense(33, 33, mask=causal, sink=torch.zeros(2)),
        dense(33, 33, mask=causal, dropout_p=0.1),
        packed(mask=causal),
    ]
    assert not any(map(is_decodable, others))


def test_hopper_is_told_by_role_and_comes_to_the_same(recording, walks):
    hopper = walks["hopper"]
    (program,) = hopper.programs
    roles = {moment.role for _, _, moment in moments(hopper)}
    assert roles == {"producer", "warpgroup 1", "warpgroup 2"}
    out = recording.arrays[recording.tensors["out"]]
    o = next(
        recording.arrays[moment.sets["o"]]
        for stage in reversed(program.stages)
        for moment in reversed(stage.moments)
        if moment.role == "warpgroup 1" and "o" in moment.sets
    )
    assert np.abs(o[:37] - out).max() < 0.05, "bf16 against fp32"
    visited = {
        (row, column) for row, line in enumerate(hopper.grid) for column, x in enumerate(line) if x != "."
    }
    assert visited == {(0, 0), (0, 1), (0, 2)}
    owners = {(moment.role, stage.tile[0]) for _, stage, moment in moments(hopper) if stage.tile is not None}
    assert owners == {("warpgroup 1", 0), ("warpgroup 2", 1)}
    for role in ("warpgroup 1", "warpgroup 2"):
        own = [stage for _, stage, moment in moments(hopper) if moment.role == role and "s" in moment.sets]
        assert {stage.kind for stage in own} == {"step"} and {stage.tile[1] for stage in own} == {0, 1, 2}
    lanes = {lane.name: lane for lane in hopper.timeline.lanes}
    steps = {span.step for span in lanes["tensor cores"].spans}
    assert steps == {stage_step for stage_step in range(3)}
    assert all(
        0 <= span.begin < span.end <= hopper.timeline.clocks for lane in lanes.values() for span in lane.spans
    )


@pytest.mark.parametrize(
    "made, reason",
    [
        (lambda: dense(17, 17, mask=tilewise.UserMask(odd_pairs)), "UserMask"),
        (lambda: dense(17, 17, dropout_p=0.1), "dropout_p"),
    ],
)
def test_what_hopper_does_not_take_is_left_out_and_the_reason_given(made, reason):
    found = recorded(made())
    assert reason in found.omitted["hopper"] and "hopper" not in {walk.name for walk in found.passes}


# ---- Comparisons


def test_rounding_errors_are_those_of_the_partial_results(request_, recording, walks):
    rounding = {each.dtype: recording.arrays[each.error] for each in recording.compare.rounding}
    keep = [tilewise_reference.masks.causal(37, 37), tilewise_reference.masks.window(20, 0, 37, 37)]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        q, k, v = (x.to(dtype) for x in (request_.q[:, 1:], request_.k, request_.v))
        exact = tilewise_reference.attention(q, k, v, mask=keep, dtype=torch.float64)[0, 0]
        with tiles.use(TILE):
            out = tilewise.attention(q, k, v, mask=MASK)[0, 0]
        at_end = np.array([[x for x in row if not np.isnan(x)][-1] for row in rounding[name].T])
        theirs = largest_difference(out, exact)  # rounded once more, to the dtype
        assert at_end.max() <= theirs + float(exact.abs().max()) * torch.finfo(dtype).eps
        assert at_end.max() > 0
    assert np.nanmax(rounding["bfloat16"]) > 100 * np.nanmax(rounding["float32"])


def test_similarities_are_each_their_own(request_, recording):
    weights = [recording.arrays[each.weights] for each in recording.compare.similarity]
    assert [each.name for each in recording.compare.similarity] == [
        "dot product",
        "scaled dot product",
        "cosine",
    ]
    keep = [tilewise_reference.masks.causal(37, 37), tilewise_reference.masks.window(20, 0, 37, 37)]
    q, k, v = request_.q[:, 1:], request_.k, torch.eye(37)[None, None]
    for found, similarity in zip(weights, ("dot", "scaled_dot", "cosine"), strict=True):
        given = dict(mask=keep, similarity=similarity)
        exact = tilewise_reference.attention(q, k, v, **given, dtype=torch.float64)[0, 0]
        theirs = largest_difference(pytorch_attention(q, k, v, **given)[0][0, 0], exact)
        off = (torch.from_numpy(found).double() - exact).abs()
        assert bool((off <= allowed_error(exact, torch.float32, theirs)).all())


def test_without_its_mask_the_call_visits_every_tile(recording):
    with_mask, without = recording.compare.mask
    assert without.visited == without.total == with_mask.total == 9 > with_mask.visited
    assert without.grid == ["##%"] * 3


# ---- As a page


def test_the_page_reads_what_was_recorded(recording):
    read = json.loads(recording.to_json())
    for kept, array in zip(recording.arrays.kept, read["arrays"], strict=True):
        raw = np.frombuffer(__import__("base64").b64decode(array["data"]), "<" + array["type"])
        assert raw.reshape(array["shape"]).tobytes() == kept.tobytes()
    assert {moment.file for walk in recording.passes for _, _, moment in moments(walk)} <= set(
        read["sources"]
    )
    source = read["sources"]["kernels/forward.py"]
    lines = (PACKAGE / "kernels/forward.py").read_text().splitlines()
    assert ["".join(text for _, text in line) for line in source] == lines


def test_equal_arrays_are_kept_once_and_a_page_is_never_too_large():
    arrays = Arrays()
    assert arrays.add(np.ones(3)) == arrays.add(np.ones(3, np.float32)) != arrays.add(np.ones(3, np.int64))
    with pytest.raises(TooLarge):
        for seed in range(10):
            arrays.add(np.full(MOST_BYTES // 16, seed, np.float32))


@pytest.mark.parametrize(
    "made, given, said",
    [
        (lambda: dense(600, 600), {}, "600 rows and 600 keys.*a shorter text"),
        (lambda: dense(120, 120, dims=(16, 512)), {}, "120 rows and 120 keys"),
        (lambda: dense(), dict(batch=2), "batch=2 must be from 0 to 0: the call has 1"),
        (lambda: dense(), dict(head=-1), "head=-1 must be from 0 to 1: the call has 2"),
        (lambda: dense(dtype=torch.float64), {}, "q.dtype=torch.float64"),
        (lambda: request_of(*torch.zeros(3, 1, 2, 8, 16, device="meta")), {}, "q.device=meta"),
        (CALLS["packed"], dict(batch=1), "q_len=0 and kv_len=0 of batch=1"),
    ],
)
def test_what_cannot_be_watched_says_why(made, given, said):
    with pytest.raises(ValueError, match=said):
        recorded(made(), **given)


def test_a_larger_tile_makes_room():
    assert recorded(dense(70, 70, (2, 2), (16, 16)), tile=Tile(64, 32)).passes[0].grid == ["##%", "##%"]
