// Where did this number come from? Told in words and numbers, from what was recorded.

import { at, matrix, tensor, type Pass } from "../recording";
import { meaningOf } from "../names";
import { beatsOf, type Held } from "../walk";
import { Asked } from "./asked";
import * as backward from "./backward";
import * as forward from "./forward";
import { fromMemory, loadOf } from "./memory";

const TELLERS: Record<string, forward.Teller> = {
  s: forward.score,
  sT: forward.score,
  p: forward.weight,
  pT: forward.weight,
  new_max: forward.rowMax,
  rescale: forward.rescale,
  row_sum: forward.rowSum,
  o: forward.output,
  factor: forward.factor,
  lse: forward.lse,
  row_lse: forward.lse,
  kept: forward.kept,
  dv: backward.dv,
  dk: backward.dk,
  dq: backward.dq,
  dp: backward.dp,
  dpT: backward.dpT,
  ds: backward.ds,
  dsT: backward.dsT,
  delta: backward.delta,
  sum_log2: backward.sumLog2,
};

export function originOf(pass: Pass, name: string, row: number, column: number, held: Held): string[] {
  const asked = new Asked(pass, name, row, column, held);
  const load = loadOf(held.beat.moment, name);
  const isBackward = pass.name === "dkv" || pass.name === "dq";
  if (load) return [fromMemory(load, row, column)];
  const teller = name === "row_max" ? (isBackward ? backward.keptMax : forward.rowMax) : TELLERS[name];
  const told = teller?.(asked) ?? [];
  if (told.length > 0) return told;
  const { moment } = held.beat;
  const text = meaningOf(name) || moment.note;
  return [text, `Set by ${moment.function}, line ${moment.lines[0]} of ${moment.file}.`].filter(Boolean);
}

/** The last value of a variable that holds a tensor's row at the end of its program. */
export function lastHeld(pass: Pass, name: string, place: number): { held: Held; row: number } | null {
  let found: Held | null = null;
  let first = 0;
  for (const beat of beatsOf(pass)) {
    const { owns } = beat.program;
    const index = beat.moment.sets[name];
    if (place < owns[0] || place >= owns[1] || index === undefined) continue;
    found = { index, beat, before: found };
    first = owns[0];
  }
  return found ? { held: found, row: place - first } : null;
}

/** Where a row of a whole tensor lies in memory: as the first program that read it says. */
export function addressOf(pass: Pass, name: string, row: number, column: number): string | null {
  const variable = name === "dout" ? "do" : name;
  for (const beat of beatsOf(pass)) {
    const load = loadOf(beat.moment, variable);
    const index = beat.moment.sets[variable];
    const whole = tensor(name, pass);
    if (!load || index === undefined || !whole) continue;
    const tile = matrix(index);
    const starts = matrix(load.rows).data;
    for (let i = 0; i < tile.rows; i++) {
      if ((starts[i] ?? -1) < 0) continue;
      if (isSameRow(tile, i, whole, row)) return fromMemory(load, i, column);
    }
  }
  return null;
}

function isSameRow(
  a: ReturnType<typeof matrix>,
  i: number,
  b: ReturnType<typeof matrix>,
  j: number,
): boolean {
  for (let c = 0; c < b.columns; c++) if (at(a, i, c) !== at(b, j, c)) return false;
  return true;
}
