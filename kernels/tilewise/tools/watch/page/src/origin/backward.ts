// Where the numbers of the backward pass come from.

import { short } from "../format";
import { at, type Matrix } from "../recording";
import { isClose, scale, type Asked } from "./asked";
import { keyName, rowName, type Teller } from "./forward";
import { bracketed, dot, rowTimesColumn } from "./sums";

/** A gradient that grows: what it was, and a product of two tiles. */
function grows(left: string, right: string, product: string, ofKeys: boolean): Teller {
  return (asked) => {
    const { before, row, column, beat } = asked;
    if (beat.stage.kind === "start") return ["It begins at 0."];
    if (before === null) return [];
    if (beat.stage.kind === "end") return [ending(before, asked.value)];
    const [a, b] = [asked.read(left), asked.read(right)];
    if (!a || !b) return [];
    const name = (t: number): string => (ofKeys ? keyName(asked, t) : rowName(asked, t));
    const sum = rowTimesColumn(a, row, b, column, name);
    return [
      `${short(before)} + ${product} = ${short(before)} + ${bracketed(sum.total)} = ${short(before + sum.total)}`,
      `${product}: ${sum.text}`,
    ];
  };
}

function ending(before: number, value: number): string {
  if (isClose(before * scale, value))
    return `Times the scale: ${short(before)} · ${short(scale)}. The scores were scaled, so is what flows back.`;
  return isClose(before, value) ? `Rounded for storing: ${short(before)}.` : `From ${short(before)}.`;
}

export const dv = grows("pT", "do", "Pᵀ dO", false);
export const dk = grows("dsT", "q", "dSᵀ Q", false);
export const dq = grows("ds", "k", "dS K", true);

/** dP: a row of dO times a row of V. */
function product(value: number, a: Matrix | null, i: number, b: Matrix | null, j: number): string[] {
  if (!a || !b) return [];
  const sum = dot(a, i, b, j);
  return [
    `Row of V times row of dO: ${sum.text} = ${short(sum.total)}`,
    isClose(sum.total, value) ? "" : "Rounded on its way.",
  ].filter(Boolean);
}

export const dp: Teller = (asked) =>
  product(asked.value, asked.read("do"), asked.row, asked.read("v"), asked.column);
export const dpT: Teller = (asked) =>
  product(asked.value, asked.read("v"), asked.row, asked.read("do"), asked.column);

function change(asked: Asked, p: Matrix | null, dpNow: Matrix | null, row: number): string[] {
  const delta = asked.ofRow("delta", row);
  if (!p || !dpNow || delta === null) return [];
  const [weight, slope] = [at(p, asked.row, asked.column), at(dpNow, asked.row, asked.column)];
  const total = weight * (slope - delta);
  if (asked.value === 0 && total !== 0) return ["The mask hides this pair: nothing flows back through it."];
  return [`P · (dP − delta) = ${short(weight)} · (${short(slope)} − ${bracketed(delta)}) = ${short(total)}`];
}

export const ds: Teller = (asked) => change(asked, asked.read("p"), asked.read("dp"), asked.row);
export const dsT: Teller = (asked) => change(asked, asked.read("pT"), asked.read("dpT"), asked.column);

export const delta: Teller = () => [
  "Σ dO · O over the row's columns, computed once before: how much the whole row pulls.",
];
export const sumLog2: Teller = (asked) => [
  `log₂ row_sum, kept by the forward pass: row_sum was ${short(2 ** asked.value)}.`,
];
export const keptMax: Teller = () => [
  "Kept by the forward pass, a number a row, so that the weights can be computed again.",
];
