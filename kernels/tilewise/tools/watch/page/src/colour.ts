// Colours of numbers. Blue is positive and orange negative, which every kind of colour vision tells apart; weights
// run from paper to deep blue. -inf, NaN and "false" are drawn as patterns, not as colours: Heat.tsx.

import { scaleLinear } from "d3-scale";
import { interpolateLab } from "d3-interpolate";
import { effect, signal } from "@preact/signals";
import type { Kind } from "./names";

export type Theme = "light" | "dark";

const asked = matchMedia("(prefers-color-scheme: dark)");
export const theme = signal<Theme>(asked.matches ? "dark" : "light");
let chosen = false;
effect(() => {
  document.documentElement.dataset.theme = theme.value;
});
asked.addEventListener("change", () => {
  if (!chosen) theme.value = asked.matches ? "dark" : "light";
});

export function switchTheme(): void {
  chosen = true;
  theme.value = theme.value === "dark" ? "light" : "dark";
}

const SIGNED: Record<Theme, string[]> = {
  light: ["#8a3f00", "#e39b57", "#faf7f2", "#7db0e2", "#164a86"],
  dark: ["#ffbd7a", "#a35c1c", "#1d2228", "#2c639f", "#93c8ff"],
};
const WEIGHT: Record<Theme, string[]> = {
  light: ["#faf7f2", "#a9cbea", "#3f7cc0", "#123c70"],
  dark: ["#1d2228", "#24507f", "#5c9bdb", "#d9ebfb"],
};
const STEPS = 512; // colours of a scale
const HALF = 0.179; // the luminance on which black and white are read equally well

export interface Scale {
  kind: Kind;
  low: number;
  high: number;
  colour: (x: number) => string;
  isDark: (x: number) => boolean; // is the colour dark, so that a number on it must be light?
}

const tables = new Map<string, { colours: string[]; dark: boolean[] }>();

function table(kind: "signed" | "weight", of: Theme): { colours: string[]; dark: boolean[] } {
  const key = `${kind} ${of}`;
  let found = tables.get(key);
  if (!found) {
    const stops = (kind === "signed" ? SIGNED : WEIGHT)[of];
    const scale = scaleLinear<string>()
      .domain(stops.map((_, i) => i / (stops.length - 1)))
      .range(stops)
      .interpolate(interpolateLab);
    const colours = Array.from({ length: STEPS }, (_, i) => scale(i / (STEPS - 1)));
    found = { colours, dark: colours.map((each) => luminance(each) < HALF) };
    tables.set(key, found);
  }
  return found;
}

function luminance(colour: string): number {
  const [r = 0, g = 0, b = 0] = (colour.match(/[\d.]+/g) ?? []).map((each) => Number(each) / 255);
  return 0.2126 * r ** 2.2 + 0.7152 * g ** 2.2 + 0.0722 * b ** 2.2;
}

/** Signed numbers run from -high to high, weights from 0 to high with small ones spread (by a square root). */
export function scaleFor(kind: Kind, high: number, of: Theme): Scale {
  const isSigned = kind === "signed";
  const { colours, dark } = table(isSigned ? "signed" : "weight", of);
  const most = high > 0 ? high : 1;
  const place = (x: number): number => {
    const part = isSigned ? (x / most + 1) / 2 : Math.sqrt(Math.max(0, x) / most);
    return Math.round(Math.min(1, Math.max(0, part)) * (STEPS - 1));
  };
  if (kind === "index")
    return { kind, low: 0, high: most, colour: () => colours[0]!, isDark: () => of === "dark" };
  return {
    kind,
    low: isSigned ? -most : 0,
    high: most,
    colour: (x) => colours[place(x)]!,
    isDark: (x) => dark[place(x)]!,
  };
}
