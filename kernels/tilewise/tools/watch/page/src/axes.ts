// What the rows and columns of a variable stand for, and so which words belong to them.

import { wordsOf, type Matrix, type Pass } from "./recording";
import type { Beat } from "./walk";

export type Axis = "row" | "key" | "dim" | "one" | "other";

const KNOWN: Record<string, [Axis, Axis]> = {
  q: ["row", "dim"],
  k: ["key", "dim"],
  v: ["key", "dim"],
  o: ["row", "dim"],
  do: ["row", "dim"],
  part_o: ["row", "dim"],
  out: ["row", "dim"],
  dout: ["row", "dim"],
  dq: ["row", "dim"],
  dk: ["key", "dim"],
  dv: ["key", "dim"],
  s: ["row", "key"],
  p: ["row", "key"],
  dp: ["row", "key"],
  ds: ["row", "key"],
  sT: ["key", "row"],
  pT: ["key", "row"],
  dpT: ["key", "row"],
  dsT: ["key", "row"],
  seen: ["key", "one"],
  span: ["other", "one"],
  kv_idx: ["key", "one"],
  kv_row: ["key", "one"],
};

/** The axes of an array of this name, by name or else by its shape. */
export function axesOf(name: string, x: Matrix, pass: Pass): [Axis, Axis] {
  if (x.rows * x.columns === 1) return ["one", "one"];
  const byKeys = pass.name === "dkv";
  const known = KNOWN[name];
  if (known) return known;
  if (x.columns === 1) return [x.rows === pass.tile[0] || pass.name === "combine" ? "row" : "other", "one"];
  if (x.rows === 1) return ["one", "row"];
  const [rows, keys] = pass.tile;
  const isTransposed = name.endsWith("T") || (byKeys && name === "kept");
  if (isTransposed && x.rows === keys && x.columns === rows) return ["key", "row"];
  if (x.rows === rows && x.columns === keys) return ["row", "key"];
  return [x.rows === rows ? "row" : "other", "other"];
}

/** Where in the whole matrix a row or key of the tile of this moment lies. */
export function placeOf(axis: Axis, i: number, now: Beat, pass: Pass): number {
  if (axis === "row") {
    const tile = now.stage.tile ?? lastTile(now);
    if (now.program.walks === "rows") return (tile ? tile[0] * pass.tile[0] : 0) + i;
    const group = /^warpgroup (\d+)$/.exec(now.moment.role ?? "");
    return now.program.owns[0] + (group ? (Number(group[1]) - 1) * pass.tile[0] : 0) + i;
  }
  if (axis === "key") {
    if (now.program.walks === "rows") return now.program.owns[0] + i;
    const tile = now.stage.tile ?? lastTile(now);
    return (tile ? tile[1] * pass.tile[1] : 0) + i;
  }
  return i;
}

function lastTile(now: Beat): [number, number] | null {
  for (let i = now.stageAt; i >= 0; i--) {
    const tile = now.program.stages[i]?.tile;
    if (tile) return tile;
  }
  return null;
}

/** The word at a place, or a dash beyond the end, where a tile has rows that the text has not. */
export function wordAt(axis: Axis, place: number, pass: Pass | null): string {
  if (axis === "row") return wordsOf(pass).queries[place] ?? "–";
  if (axis === "key") return wordsOf(pass).keys[place] ?? "–";
  if (axis === "dim") return `column ${place}`;
  return "";
}

export function isBeyond(axis: Axis, place: number, pass: Pass): boolean {
  return (axis === "row" && place >= pass.lengths[0]) || (axis === "key" && place >= pass.lengths[1]);
}
