// Sums of products, told by their largest terms.

import { short } from "../format";
import { at, type Matrix } from "../recording";

export interface Term {
  a: number;
  b: number;
  what: string; // which column, row or key
}

export interface Sum {
  text: string;
  total: number; // in float64
}

const SHOWN = 3;

export function sumOf(terms: Term[]): Sum {
  const total = terms.reduce((sum, each) => sum + (each.a === 0 ? 0 : each.a * each.b), 0);
  const largest = terms
    .filter((each) => each.a !== 0 && each.b !== 0)
    .sort((x, y) => Math.abs(y.a * y.b) - Math.abs(x.a * x.b));
  const rest = largest.length - SHOWN;
  const shown = largest
    .slice(0, SHOWN)
    .map((each) => `${short(each.a)} · ${bracketed(each.b)} (${each.what})`);
  if (rest > 0) shown.push(`${rest} smaller ${rest === 1 ? "term" : "terms"}`);
  return { text: shown.join(" + ") || "nothing", total };
}

export function bracketed(x: number): string {
  return x < 0 ? `(${short(x)})` : short(x);
}

/** Row `i` of a times row `j` of b. */
export function dot(a: Matrix, i: number, b: Matrix, j: number): Sum {
  const count = Math.min(a.columns, b.columns);
  return sumOf(
    Array.from({ length: count }, (_, c) => ({ a: at(a, i, c), b: at(b, j, c), what: `column ${c}` })),
  );
}

/** Row `i` of a times column `j` of b. */
export function rowTimesColumn(
  a: Matrix,
  i: number,
  b: Matrix,
  j: number,
  name: (term: number) => string,
): Sum {
  const count = Math.min(a.columns, b.rows);
  return sumOf(Array.from({ length: count }, (_, t) => ({ a: at(a, i, t), b: at(b, t, j), what: name(t) })));
}
