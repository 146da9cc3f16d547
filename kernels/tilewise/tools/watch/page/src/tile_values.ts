// Which matrix of a step the map shows on its tile: scores when they are there, then weights, then gradients.

import type { Moment, Stage } from "./recording";

const SHOWN = new Set(["s", "p", "dp", "ds", "sT", "pT", "dpT", "dsT"]);

export interface TileValues {
  name: string;
  index: number;
}

/** The latest of these that the stage has set, up to and with a moment. */
export function tileValues(stage: Stage, upTo: number): TileValues | null {
  for (let i = Math.min(upTo, stage.moments.length - 1); i >= 0; i--) {
    const sets = (stage.moments[i] as Moment).sets;
    for (const name of Object.keys(sets).reverse()) if (SHOWN.has(name)) return { name, index: sets[name]! };
  }
  return null;
}
