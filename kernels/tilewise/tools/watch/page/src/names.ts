// How a variable is called in the equations, and what kind of numbers it holds.

import { recording } from "./recording";

const SYMBOLS: Record<string, string> = {
  q: "Q",
  k: "K",
  v: "V",
  s: "S",
  p: "P",
  o: "O",
  out: "O",
  do: "dO",
  dout: "dO",
  dq: "dQ",
  dk: "dK",
  dv: "dV",
  dp: "dP",
  ds: "dS",
  sT: "Sᵀ",
  pT: "Pᵀ",
  dpT: "dPᵀ",
  dsT: "dSᵀ",
  part_o: "Oₛ",
  lse: "LSE",
  row_lse: "LSE",
};

/** The symbol of a matrix; what is a number a row keeps the name that it has in the source. */
export function symbolOf(name: string): string {
  return SYMBOLS[name] ?? name;
}

export function meaningOf(name: string): string {
  return recording.glossary[name]?.text ?? "";
}

export type Kind = "signed" | "weight" | "bool" | "index";

const WEIGHTS = new Set([
  "p",
  "pT",
  "rescale",
  "weight",
  "weights",
  "factor",
  "row_sum",
  "part_sum",
  "a",
  "b",
]);

export function kindOf(name: string, type: "f4" | "i4" | "u1"): Kind {
  if (type === "u1") return "bool";
  if (type === "i4") return "index";
  return WEIGHTS.has(name) ? "weight" : "signed";
}
