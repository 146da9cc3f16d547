// What the reader points at, told: its name, its words, its value, its origin.

import { now, pass, position, type Picked } from "./app_state";
import { axesOf, isBeyond, placeOf, wordAt, type Axis } from "./axes";
import { exact } from "./format";
import { meaningOf, symbolOf } from "./names";
import { toMemory } from "./origin/memory";
import { addressOf, lastHeld, originOf } from "./origin/origin";
import { at, matrix, tensor, wordsOf, type Matrix } from "./recording";
import { tileValues } from "./tile_values";
import { isThere, stateAt } from "./walk";

export interface Told {
  name: string; // S[3, 17]
  words: string; // “sat” · “cat”
  value: string; // exact, or "" where nothing is there
  origin: string[];
  meaning: string;
}

export function told(picked: Picked): Told {
  switch (picked.of) {
    case "variable":
      return ofVariable(picked.name, picked.row, picked.column);
    case "tensor":
      return ofTensor(picked.name, picked.row, picked.column);
    case "map":
      return ofMap(picked.row, picked.column);
    case "weights":
      return {
        name: `${picked.name}[${picked.row}, ${picked.column}]`,
        words: pairOf("row", picked.row, "key", picked.column),
        value: exact(at(matrix(picked.index), picked.row, picked.column)),
        origin: ["Softmax of the row's scores: all weights of a row together are 1."],
        meaning: "",
      };
  }
}

const quoted = (word: string): string =>
  word ? (word.startsWith("column") || word === "–" ? word : `“${word}”`) : "";

function pairOf(rowAxis: Axis, row: number, columnAxis: Axis, column: number): string {
  const words = [
    quoted(wordAt(rowAxis, row, pass.value)),
    quoted(wordAt(columnAxis, column, pass.value)),
  ].filter(Boolean);
  return words.join(rowAxis !== "dim" && columnAxis !== "dim" ? " × " : ", ");
}

function indexText(symbol: string, x: Matrix, row: number, column: number): string {
  if (x.rows * x.columns === 1 && x.shape.length === 0) return symbol;
  return x.shape.length < 2 ? `${symbol}[${row}]` : `${symbol}[${row}, ${column}]`;
}

function ofVariable(name: string, row: number, column: number): Told {
  const [at_, beat] = [pass.value!, now.value!];
  const state = stateAt(at_, position.value);
  const held = state.get(name);
  const symbol = symbolOf(name);
  const nothing = { name: symbol, words: "", value: "", meaning: meaningOf(name) };
  if (!held) return { ...nothing, origin: ["Not set yet in this program."] };
  if (!isThere(name, held, beat))
    return { ...nothing, origin: ["Gone: it belonged to the tile before, and nothing stored it."] };
  const x = matrix(held.index);
  if (row >= x.rows || column >= x.columns) return { ...nothing, origin: [] };
  const [rowAxis, columnAxis] = axesOf(name, x, at_);
  const place = (axis: Axis, i: number): number => placeOf(axis, i, beat, at_);
  const [r, c] = [place(rowAxis, row), place(columnAxis, column)];
  const beyond = isBeyond(rowAxis, r, at_) || isBeyond(columnAxis, c, at_);
  return {
    name: indexText(symbol, x, row, column),
    words: pairOf(rowAxis, r, columnAxis, c),
    value: exact(at(x, row, column), x.type),
    origin: [
      ...stored(name, row, column),
      ...originOf(at_, name, row, column, held),
      ...(beyond ? ["Beyond the end of the text: the tile is larger than what is left."] : []),
    ],
    meaning: meaningOf(name),
  };
}

/** Where this moment writes it. */
function stored(name: string, row: number, column: number): string[] {
  return now
    .value!.moment.stores.filter((each) => each.variable === name)
    .map((each) => toMemory(each, row, column));
}

const VARIABLE: Record<string, string> = { out: "o", dq: "dq", dk: "dk", dv: "dv" };

function ofTensor(name: string, row: number, column: number): Told {
  const x = tensor(name, pass.value)!;
  const axis: Axis = ["k", "v", "dk", "dv"].includes(name) ? "key" : "row";
  const variable = VARIABLE[name];
  const last = variable ? lastHeld(pass.value!, variable, row) : null;
  const origin = last
    ? originOf(pass.value!, variable!, last.row, column, last.held)
    : [addressOf(pass.value!, name, row, column) ?? "A row of the tensor that the call was given."];
  return {
    name: indexText(symbolOf(name), x, row, column),
    words: pairOf(axis, row, "dim", column),
    value: exact(at(x, row, column)),
    origin,
    meaning: meaningOf(name),
  };
}

/** A pair of words on the map: a number only where the walk stands. */
function ofMap(row: number, column: number): Told {
  const [at_, beat] = [pass.value!, now.value!];
  const [tileQ, tileK] = at_.tile;
  const [i, j] = [Math.floor(row / tileQ), Math.floor(column / tileK)];
  const tile = beat.stage.tile;
  const shown = tile && tile[0] === i && tile[1] === j ? tileValues(beat.stage, beat.momentAt) : null;
  if (shown) {
    const [r, c] = [row - i * tileQ, column - j * tileK];
    return shown.name.endsWith("T") ? ofVariable(shown.name, c, r) : ofVariable(shown.name, r, c);
  }
  const sign = at_.grid[i]?.[j];
  const words = `“${wordsOf(at_).queries[row]}” × “${wordsOf(at_).keys[column]}”`;
  const why =
    sign === "."
      ? "No program ever visits this tile: the mask hides all of it."
      : tile && tile[0] === i && tile[1] === j
        ? "The walk stands here, but the scores are not computed yet."
        : "Nothing is stored here. The number exists only while a program stands on its tile. Click to go there.";
  return { name: `pair [${row}, ${column}]`, words, value: "", origin: [why], meaning: "" };
}
