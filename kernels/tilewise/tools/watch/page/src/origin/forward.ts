// Where the numbers of the forward pass come from.

import { axesOf, placeOf, wordAt } from "../axes";
import { short } from "../format";
import { at, matrix, recording, tensor } from "../recording";
import {
  computed,
  isClose,
  isScaledLate,
  plain,
  scale,
  type Account,
  type Asked,
  type Teller,
} from "./asked";
import { bracketed, dot, rowTimesColumn } from "./sums";

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

/** exp((a - b) · unit) */
function power(a: number, b: number, unit: number): string {
  const difference = `${short(a)} − ${bracketed(b)}`;
  return unit === 1 ? `exp(${difference})` : `exp((${difference}) · ${short(unit)})`;
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
function fromShared(asked: Asked, row: number, key: number): Account | null {
  const { beat, pass } = asked;
  const [q, k] = [tensor("q", pass), tensor("k", pass)];
  const [i, j] = [placeOf("row", row, beat, pass), placeOf("key", key, beat, pass)];
  if (!q || !k || i >= q.rows || j >= k.rows) return null;
  const sum = dot(q, i, k, j);
  return plain(
    `Row of Q times row of K, by the tensor cores, from shared memory and in 16 bits: about ${sum.text} = ${short(sum.total)}`,
  );
}

export const score: Teller = (asked) => {
  const [row, key] = pair(asked);
  if (asked.value === -Infinity)
    return plain(
      `The mask hides the key ${keyName(asked, key)} from ${rowName(asked, row)}: −∞, whose exponential is 0.`,
    );
  const [q, k] = [asked.read("q"), asked.read("k")];
  if (!q || !k) return fromShared(asked, row, key);
  const sum = dot(q, row, k, key);
  const lines = [`Row of Q times row of K: ${sum.text} = ${short(sum.total)}`];
  const { score: modifiers, similarity } = recording.call;
  if (isClose(sum.total, asked.value)) {
    if (isScaledLate)
      lines.push(`The scale ${short(scale)} joins in the exponential, where it costs nothing.`);
  } else if (similarity === "cosine") lines.push("Divided by both lengths: the cosine, times its scale.");
  else if (modifiers) lines.push(`Then the scale, and ${modifiers}.`);
  else lines.push("Then the scale.");
  return plain(...lines);
};

export const weight: Teller = (asked) => {
  const [row, key] = pair(asked);
  const s = asked.read(asked.name === "pT" ? "sT" : "s");
  const rowMax = newMax(asked, row);
  const sumLog2 = asked.ofRow("sum_log2", row);
  if (!s || rowMax === null) return null;
  const value = asked.name === "pT" ? at(s, key, row) : at(s, row, key);
  const hidden = `the mask hides ${keyName(asked, key)} from ${rowName(asked, row)}`;
  if (value === -Infinity) return plain(`exp(−∞) = 0: ${hidden}.`);
  const base = rowMax === -Infinity ? 0 : rowMax;
  if (asked.value === 0 && Math.exp(value - base) > 1e-30) return plain(`0: ${hidden}.`);
  const unit = unitOf(value, base, asked.value, sumLog2 ?? 0);
  const result = Math.exp((value - base) * unit);
  const text = power(value, base, unit);
  if (sumLog2 === null) return computed(result, `exp(S − row_max) = ${text} = ${short(result)}`);
  const whole = result / 2 ** sumLog2;
  return computed(whole, `exp(S − row_max) / row_sum = ${text} / ${short(2 ** sumLog2)} = ${short(whole)}`);
};

export const rowMax: Teller = (asked) => {
  const { row } = asked;
  if (asked.beat.stage.kind === "start") return plain("No key has been seen: the largest of nothing is −∞.");
  const s = asked.read("s");
  const before = asked.name === "row_max" ? asked.before : asked.ofRow("row_max", row);
  if (!s || before === null) return null;
  let best = 0;
  for (let j = 1; j < s.columns; j++) if (at(s, row, j) > at(s, row, best)) best = j;
  const largest = at(s, row, best);
  return computed(
    Math.max(before, largest),
    `The larger of row_max before, ${short(before)}, and the largest of this tile, ${short(largest)} (${keyName(asked, best)}).`,
    asked.value === before ? "It stays." : "It grows: what was summed so far must be rescaled.",
  );
};

export const rescale: Teller = (asked) => {
  const { row } = asked;
  const next = newMax(asked, row);
  const held = asked.state.get("row_max");
  // The assignment of row_max and rescale is one statement, so the old value lies before it.
  const source = held && held.beat.stage === asked.beat.stage && held.before ? held.before : held;
  const old = source ? (matrix(source.index).data[row] ?? null) : null;
  if (next === null || old === null) return null;
  if (old === -Infinity) return plain("exp(−∞) = 0: nothing was summed before.");
  const unit = unitOf(old, next, asked.value);
  const result = Math.exp((old - next) * unit);
  return computed(result, `exp(old row_max − new) = ${power(old, next, unit)} = ${short(result)}`);
};

export const rowSum: Teller = (asked) => {
  const { row, before } = asked;
  if (asked.beat.stage.kind === "start") return plain("No key has been seen: the sum is 0.");
  const p = asked.read("p");
  const by = asked.ofRow("rescale", row);
  if (!p || by === null || before === null) return null;
  let sum = 0;
  for (let j = 0; j < p.columns; j++) sum += at(p, row, j);
  const total = before * by + sum;
  return computed(
    total,
    `row_sum · rescale + Σ P = ${short(before)} · ${short(by)} + ${short(sum)} = ${short(total)}`,
  );
};

export const output: Teller = (asked) => {
  const { row, column, before } = asked;
  if (asked.beat.stage.kind === "start") return plain("O begins at 0.");
  if (before === null) return null;
  if (asked.beat.stage.kind === "end") return finished(asked, before);
  const by = asked.ofRow("rescale", row);
  const [p, v] = [asked.read("p"), asked.read("v")];
  if (asked.pass.name === "combine") return joined(asked, before);
  if (by === null) return null;
  if (!v && isClose(before * by, asked.value))
    return computed(before * by, `O · rescale = ${short(before)} · ${short(by)}`);
  if (!p || !v) return null;
  const sum = rowTimesColumn(p, row, v, column, (j) => keyName(asked, j));
  const total = before * by + sum.total;
  return computed(
    total,
    `O · rescale + P V = ${short(before)} · ${short(by)} + ${bracketed(sum.total)} = ${short(total)}`,
    `P V: ${sum.text}`,
  );
};

/** After the walk: divided, or rounded. */
function finished(asked: Asked, before: number): Account | null {
  const sum = asked.ofRow("row_sum", asked.row);
  const by = asked.ofRow("factor", asked.row) ?? (sum === null ? null : 1 / (sum || 1));
  if (by !== null && isClose(before * by, asked.value))
    return computed(before * by, `O / row_sum = ${short(before)} · ${short(by)} = ${short(before * by)}`);
  return isClose(before, asked.value) ? plain(`Rounded for storing: ${short(before)}.`) : null;
}

/** Two states of the softmax as one. */
function joined(asked: Asked, before: number): Account | null {
  const [a, b] = [asked.ofRow("a", asked.row), asked.ofRow("b", asked.row)];
  const part = asked.read("part_o");
  if (a === null || b === null || !part) return null;
  const other = at(part, asked.row, asked.column);
  const total = before * a + other * b;
  return computed(
    total,
    `O · a + Oₛ · b = ${short(before)} · ${short(a)} + ${bracketed(other)} · ${short(b)} = ${short(total)}`,
  );
}

export const factor: Teller = (asked) => {
  const sum = asked.ofRow("row_sum", asked.row);
  if (sum === null) return null;
  return computed(
    1 / (sum || 1),
    `1 / row_sum = 1 / ${short(sum || 1)}: one division a row, not one a number.`,
  );
};

export const lse: Teller = (asked) => {
  const [max, sum] = [asked.ofRow("row_max", asked.row), asked.ofRow("row_sum", asked.row)];
  if (max === null || sum === null || asked.beat.stage.kind !== "end") return null;
  const unit = isClose(max * scale + Math.log(sum), asked.value) ? scale : 1;
  const total = max * unit + Math.log(sum);
  const times = unit === 1 ? "" : ` · ${short(unit)}`;
  return computed(total, `row_max + ln row_sum = ${short(max)}${times} + ln ${short(sum)} = ${short(total)}`);
};

export const kept: Teller = (asked) => {
  const [rowAxis] = axesOf(asked.name, matrix(asked.held.index), asked.pass);
  const [row, key] = rowAxis === "key" ? [asked.column, asked.row] : [asked.row, asked.column];
  const may = asked.value ? "may" : "may not";
  return plain(
    `${recording.call.mask || "The end of the keys"}: ${rowName(asked, row)} ${may} see ${keyName(asked, key)}.`,
  );
};
