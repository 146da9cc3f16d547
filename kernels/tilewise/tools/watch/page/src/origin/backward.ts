// Where the numbers of the backward pass come from.

import { short } from "../format";
import { at, type Matrix } from "../recording";
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
import { keyName, rowName } from "./forward";
import { bracketed, dot, rowTimesColumn } from "./sums";

/** A gradient that grows: what it was, and a product of two tiles. */
function grows(left: string, right: string, product: string, ofKeys: boolean): Teller {
  return (asked) => {
    const { before, row, column, beat } = asked;
    if (beat.stage.kind === "start") return plain("It begins at 0.");
    if (before === null) return null;
    if (beat.stage.kind === "end") return ending(before, asked.value);
    const [a, b] = [asked.read(left), asked.read(right)];
    if (!a || !b) return null;
    const name = (t: number): string => (ofKeys ? keyName(asked, t) : rowName(asked, t));
    const sum = rowTimesColumn(a, row, b, column, name);
    const total = before + sum.total;
    return computed(
      total,
      `${short(before)} + ${product} = ${short(before)} + ${bracketed(sum.total)} = ${short(total)}`,
      `${product}: ${sum.text}`,
    );
  };
}

function ending(before: number, value: number): Account | null {
  if (isScaledLate && scale !== 1 && isClose(before * scale, value))
    return plain(
      `Times the scale: ${short(before)} · ${short(scale)}. The scores were scaled, so is what flows back.`,
    );
  return isClose(before, value) ? plain(`Rounded for storing: ${short(before)}.`) : null;
}

export const dv = grows("pT", "do", "Pᵀ dO", false);
export const dk = grows("dsT", "q", "dSᵀ Q", false);
export const dq = grows("ds", "k", "dS K", true);

/** dP: a row of dO times a row of V. */
function product(a: Matrix | null, i: number, b: Matrix | null, j: number): Account | null {
  if (!a || !b) return null;
  const sum = dot(a, i, b, j);
  return computed(sum.total, `Row of V times row of dO: ${sum.text} = ${short(sum.total)}`);
}

export const dp: Teller = (asked) => product(asked.read("do"), asked.row, asked.read("v"), asked.column);
export const dpT: Teller = (asked) => product(asked.read("v"), asked.row, asked.read("do"), asked.column);

function change(asked: Asked, p: Matrix | null, dpNow: Matrix | null, row: number): Account | null {
  const delta = asked.ofRow("delta", row);
  if (!p || !dpNow || delta === null) return null;
  const [weight, slope] = [at(p, asked.row, asked.column), at(dpNow, asked.row, asked.column)];
  const total = weight * (slope - delta);
  if (asked.value === 0 && total !== 0)
    return plain("The mask hides this pair: nothing flows back through it.");
  return computed(
    total,
    `P · (dP − delta) = ${short(weight)} · (${short(slope)} − ${bracketed(delta)}) = ${short(total)}`,
  );
}

export const ds: Teller = (asked) => change(asked, asked.read("p"), asked.read("dp"), asked.row);
export const dsT: Teller = (asked) => change(asked, asked.read("pT"), asked.read("dpT"), asked.column);

export const delta: Teller = () =>
  plain("Σ dO · O over the row's columns, computed once before: how much the whole row pulls.");
export const sumLog2: Teller = (asked) => {
  const when = asked.pass.name === "dkv" || asked.pass.name === "dq" ? "by the forward" : "for the backward";
  return plain(`log₂ row_sum, kept ${when} pass: row_sum is ${short(2 ** asked.value)}.`);
};
export const keptMax: Teller = () =>
  plain("Kept by the forward pass, a number a row, so that the weights can be computed again.");
