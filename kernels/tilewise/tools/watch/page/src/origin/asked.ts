// The number whose origin is asked for, and the variables as they stood when it was set.

import { at, matrix, recording, type Matrix, type Pass } from "../recording";
import { stateAt, type Beat, type Held, type State } from "../walk";

export class Asked {
  readonly state: State; // when the number was set, that moment included
  readonly beat: Beat;

  constructor(
    readonly pass: Pass,
    readonly name: string,
    readonly row: number,
    readonly column: number,
    readonly held: Held,
  ) {
    this.beat = held.beat;
    this.state = new Map(stateAt(pass, held.beat.position));
  }

  get value(): number {
    return at(matrix(this.held.index), this.row, this.column);
  }

  /** A variable as this statement read it: its old value where the statement sets it, too. */
  read(name: string): Matrix | null {
    const found = this.state.get(name);
    if (!found) return null;
    const isSetHere = found.beat === this.beat && name === this.name;
    const held = isSetHere ? found.before : found;
    return held ? matrix(held.index) : null;
  }

  /** The value that this one replaced. */
  get before(): number | null {
    return this.held.before ? at(matrix(this.held.before.index), this.row, this.column) : null;
  }

  /** One of the numbers that there are for each row, whichever way the vector lies. */
  ofRow(name: string, i: number): number | null {
    const x = this.read(name);
    return x ? (x.data[x.data.length === 1 ? 0 : i] ?? null) : null;
  }
}

/** 1 where the scores have it in them already. */
export const scale = recording.call.scale ?? 1;

/** Are two numbers equal but for rounding, of bf16 where the call is in that? */
export function isClose(a: number, b: number): boolean {
  const tolerance = recording.call.dtype === "float32" ? 1e-4 : 2e-2;
  return a === b || Math.abs(a - b) <= tolerance * (1e-3 + Math.max(Math.abs(a), Math.abs(b)));
}
