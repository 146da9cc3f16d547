// Where the numbers of the forward pass come from.

import { axesOf, placeOf, wordAt } from "../axes";
import { short } from "../format";
import { at, matrix, recording, tensor } from "../recording";
import { isClose, scale, type Asked } from "./asked";
import { bracketed, dot, rowTimesColumn } from "./sums";

export type Teller = (asked: Asked) => string[];

/** The row's maximum that this tile has led to: its own variable until it is assigned to row_max. */
function newMax(asked: Asked, row: number): number | null {
  const isFresh = asked.state.get("new_max")?.beat.stage === asked.beat.stage;
  return isFresh ? asked.ofRow("new_max", row) : asked.ofRow("row_max", row);
}

/** The scale is inside the scores, or joins them in the exponential: both are seen in kernels. */
function unitOf(s: number, rowMax: number, weight: number, sumLog2 = 0): number {
  const value = (unit: number): number => Math.exp((s - rowMax) * unit) / 2 ** sumLog2;
  return Math.abs(value(scale) - weight) <= Math.abs(value(1) - weight) ? scale : 1;
}

const timesUnit = (unit: number): string => (unit === 1 ? "" : ` · ${short(unit)}`);

/** What the sum gives here beside what the kernel recorded. */
function beside(total: number, recorded: number): string {
  return isClose(total, recorded)
    ? short(total)
    : `${short(total)}, in float64; the kernel rounds on its way`;
}

export function keyName(asked: Asked, key: number): string {
  const { beat, pass } = asked;
  return `“${wordAt("key", placeOf("key", key, beat, pass), pass)}”`;
}

export function rowName(asked: Asked, row: number): string {
  const { beat, pass } = asked;
  return `“${wordAt("row", placeOf("row", row, beat, pass), pass)}”`;
}

/** S[i, j], whichever way it lies: its row and its key. */
function pair(asked: Asked): [number, number] {
  return asked.name.endsWith("T") ? [asked.column, asked.row] : [asked.row, asked.column];
}

/** A score of tiles that lie in shared memory, of which a warpgroup has no copy. */
function fromShared(asked: Asked, row: number, key: number): string[] {
  const { beat, pass } = asked;
  const [q, k] = [tensor("q", pass), tensor("k", pass)];
  const [i, j] = [placeOf("row", row, beat, pass), placeOf("key", key, beat, pass)];
  if (!q || !k || i >= q.rows || j >= k.rows) return [];
  const sum = dot(q, i, k, j);
  return [
    `Row of Q times row of K, by the tensor cores, from shared memory and in 16 bits: about ${sum.text} = ${short(sum.total)}`,
  ];
}

export const score: Teller = (asked) => {
  const [row, key] = pair(asked);
  if (asked.value === -Infinity)
    return [
      `The mask hides the key ${keyName(asked, key)} from ${rowName(asked, row)}: −∞, whose exponential is 0.`,
    ];
  const [q, k] = [asked.read("q"), asked.read("k")];
  if (!q || !k) return fromShared(asked, row, key);
  const sum = dot(q, row, k, key);
  const lines = [`Row of Q times row of K: ${sum.text} = ${short(sum.total)}`];
  if (isClose(sum.total, asked.value))
    lines.push(`The scale ${short(scale)} joins in the exponential, where it costs nothing.`);
  else if (isClose(sum.total * scale, asked.value))
    lines.push(`· scale ${short(scale)} = ${short(sum.total * scale)}`);
  else if (recording.call.similarity === "cosine")
    lines.push("Divided by both lengths: the cosine, times its scale.");
  else
    lines.push(
      recording.call.score
        ? `Then ${recording.call.score} and the scale ${short(scale)}.`
        : "Rounded on its way.",
    );
  return lines;
};

export const weight: Teller = (asked) => {
  const [row, key] = pair(asked);
  const s = asked.read(asked.name === "pT" ? "sT" : "s");
  const rowMax = newMax(asked, row);
  const sumLog2 = asked.ofRow("sum_log2", row);
  if (!s || rowMax === null) return [];
  const value = asked.name === "pT" ? at(s, key, row) : at(s, row, key);
  if (value === -Infinity)
    return [`exp(−∞) = 0: the mask hides ${keyName(asked, key)} from ${rowName(asked, row)}.`];
  const base = rowMax === -Infinity ? 0 : rowMax;
  const isHidden = asked.value === 0 && Math.exp(value - base) > 1e-30;
  if (isHidden)
    return [`The mask hides ${keyName(asked, key)} from ${rowName(asked, row)}, so its weight is 0.`];
  const unit = unitOf(value, base, asked.value, sumLog2 ?? 0);
  const power = `exp((${short(value)} − ${bracketed(base)})${timesUnit(unit)})`;
  const result = Math.exp((value - base) * unit);
  if (sumLog2 === null) return [`exp(S − row_max) = ${power} = ${beside(result, asked.value)}`];
  const whole = result / 2 ** sumLog2;
  return [`exp(S − row_max) / row_sum = ${power} / ${short(2 ** sumLog2)} = ${beside(whole, asked.value)}`];
};

export const rowMax: Teller = (asked) => {
  const { row } = asked;
  if (asked.beat.stage.kind === "start") return ["No key has been seen: the largest of nothing is −∞."];
  const s = asked.read("s");
  const before = asked.name === "row_max" ? asked.before : asked.ofRow("row_max", row);
  if (!s || before === null) return [];
  let best = 0;
  for (let j = 1; j < s.columns; j++) if (at(s, row, j) > at(s, row, best)) best = j;
  const lines = [
    `The larger of row_max before, ${short(before)}, and the largest of this tile, ${short(at(s, row, best))} (${keyName(asked, best)}).`,
  ];
  lines.push(asked.value === before ? "It stays." : "It grows: what was summed so far must be rescaled.");
  return lines;
};

export const rescale: Teller = (asked) => {
  const { row } = asked;
  const next = newMax(asked, row);
  const held = asked.state.get("row_max");
  // The assignment of row_max and rescale is one statement, so the old value lies before it.
  const source = held && held.beat.stage === asked.beat.stage && held.before ? held.before : held;
  const old = source ? (matrix(source.index).data[row] ?? null) : null;
  if (next === null || old === null) return [];
  if (old === -Infinity) return ["exp(−∞) = 0: nothing was summed before."];
  const unit = unitOf(old, next, asked.value);
  return [
    `exp(old row_max − new) = exp((${short(old)} − ${bracketed(next)})${timesUnit(unit)}) = ${beside(Math.exp((old - next) * unit), asked.value)}`,
  ];
};

export const rowSum: Teller = (asked) => {
  const { row } = asked;
  if (asked.beat.stage.kind === "start") return ["No key has been seen: the sum is 0."];
  const p = asked.read("p");
  const factor = asked.ofRow("rescale", row);
  const { before } = asked;
  if (!p || factor === null || before === null) return [];
  let sum = 0;
  for (let j = 0; j < p.columns; j++) sum += at(p, row, j);
  return [
    `row_sum · rescale + Σ P = ${short(before)} · ${short(factor)} + ${short(sum)} = ${beside(before * factor + sum, asked.value)}`,
  ];
};

export const output: Teller = (asked) => {
  const { row, column, before } = asked;
  if (asked.beat.stage.kind === "start") return ["O begins at 0."];
  if (before === null) return [];
  if (asked.beat.stage.kind === "end") {
    const sum = asked.ofRow("row_sum", row);
    const factor = asked.ofRow("factor", row) ?? (sum === null ? null : 1 / (sum || 1));
    if (factor === null) return [];
    if (isClose(before * factor, asked.value))
      return [`O / row_sum = ${short(before)} · ${short(factor)} = ${beside(before * factor, asked.value)}`];
    return isClose(before, asked.value) ? [`Rounded for storing: ${short(before)}.`] : [];
  }
  const [p, v] = [asked.read("p"), asked.read("v")];
  const by = asked.ofRow("rescale", row);
  if (asked.pass.name === "combine") return joined(asked, before);
  if (by !== null && !v && isClose(before * by, asked.value))
    return [`O · rescale = ${short(before)} · ${short(by)}`];
  if (!p || !v || by === null) return [];
  const sum = rowTimesColumn(p, row, v, column, (j) => keyName(asked, j));
  const total = before * by + sum.total;
  return [
    `O · rescale + P V = ${short(before)} · ${short(by)} + ${short(sum.total)} = ${beside(total, asked.value)}`,
    `P V: ${sum.text}`,
  ];
};

/** Two states of the softmax as one. */
function joined(asked: Asked, before: number): string[] {
  const [a, b] = [asked.ofRow("a", asked.row), asked.ofRow("b", asked.row)];
  const part = asked.read("part_o");
  if (a === null || b === null || !part) return [];
  const other = at(part, asked.row, asked.column);
  return [
    `O · a + Oₛ · b = ${short(before)} · ${short(a)} + ${bracketed(other)} · ${short(b)} = ${beside(before * a + other * b, asked.value)}`,
  ];
}

export const factor: Teller = (asked) => {
  const sum = asked.ofRow("row_sum", asked.row);
  return sum === null
    ? []
    : [`1 / row_sum = 1 / ${short(sum === 0 ? 1 : sum)}: one division a row, not one a number.`];
};

export const lse: Teller = (asked) => {
  const [max, sum] = [asked.ofRow("row_max", asked.row), asked.ofRow("row_sum", asked.row)];
  if (max === null || sum === null) return [];
  const unit = isClose(max * scale + Math.log(sum), asked.value) ? scale : 1;
  return [
    `row_max + ln row_sum = ${short(max)}${timesUnit(unit)} + ln ${short(sum)} = ${beside(max * unit + Math.log(sum), asked.value)}`,
  ];
};

export const kept: Teller = (asked) => {
  const [rowAxis] = axesOf(asked.name, matrix(asked.held.index), asked.pass);
  const [row, key] = rowAxis === "key" ? [asked.column, asked.row] : [asked.row, asked.column];
  return [
    `${recording.call.mask || "The end of the keys"}: ${rowName(asked, row)} ${asked.value ? "may" : "may not"} see ${keyName(asked, key)}.`,
  ];
};
