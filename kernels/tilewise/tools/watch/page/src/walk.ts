// The moments of a pass in one line, and what every variable held at any of them.

import {
  matrix,
  type Index,
  type Matrix,
  type Moment,
  type Pass,
  type Program,
  type Stage,
} from "./recording";

/** One moment, and where in the pass it lies. */
export interface Beat {
  position: number;
  program: Program;
  programAt: number;
  stage: Stage;
  stageAt: number; // within the program
  moment: Moment;
  momentAt: number; // within the stage
}

/** What a variable holds, and what it held before. */
export interface Held {
  index: Index;
  beat: Beat; // where it was set
  before: Held | null;
}

export type State = Map<string, Held>;

const lines = new WeakMap<Pass, Beat[]>();

export function beatsOf(pass: Pass): Beat[] {
  let found = lines.get(pass);
  if (!found) {
    found = [];
    for (const [programAt, program] of pass.programs.entries())
      for (const [stageAt, stage] of program.stages.entries())
        for (const [momentAt, moment] of stage.moments.entries())
          found.push({ position: found.length, program, programAt, stage, stageAt, moment, momentAt });
    lines.set(pass, found);
  }
  return found;
}

/** Does one role see what the other has set? Warpgroups do not see each other's registers. */
function shares(mine: string | undefined, theirs: string | undefined): boolean {
  if (!mine || !theirs || mine === theirs) return true;
  return !theirs.includes("warpgroup");
}

let last: { pass: Pass; position: number; state: State } | null = null;

/** Every variable of the program at a moment, that moment included. */
export function stateAt(pass: Pass, position: number): State {
  if (last && last.pass === pass && last.position === position) return last.state;
  const beats = beatsOf(pass);
  const now = beats[position];
  const state: State = new Map();
  if (now) {
    let first = position;
    while (first > 0 && beats[first - 1]?.programAt === now.programAt) first--;
    for (let i = first; i <= position; i++) {
      const beat = beats[i]!;
      if (!shares(now.moment.role, beat.moment.role)) continue;
      for (const [name, index] of Object.entries(beat.moment.sets))
        state.set(name, { index, beat, before: state.get(name) ?? null });
    }
  }
  last = { pass, position, state };
  return state;
}

/** Do two moments belong to one step? Where roles take turns, a step comes in several stages. */
export function isSameStep(a: Beat, b: Beat): boolean {
  if (a.stage === b.stage) return true;
  const [s, t] = [a.stage.tile, b.stage.tile];
  return (
    a.program === b.program &&
    a.moment.role === b.moment.role &&
    s !== null &&
    t !== null &&
    s[0] === t[0] &&
    s[1] === t[1]
  );
}

/** The steps of a program, or of one role of it: the first stage of each. */
export function stepsOf(program: Program, role: string | undefined): Stage[] {
  const found: Stage[] = [];
  const walksTiles = program.stages.some((stage) => stage.tile && (!role || stage.moments[0]?.role === role));
  for (const stage of program.stages) {
    if (role && stage.moments[0]?.role !== role) continue;
    if (!stage.tile && (stage.kind !== "step" || walksTiles)) continue;
    const isKnown = stage.tile && role && found.some((each) => String(each.tile) === String(stage.tile));
    if (!isKnown) found.push(stage);
  }
  return found;
}

/** What a variable held when the step of this moment began. */
export function atStageStart(held: Held | undefined, now: Beat): Held | null {
  let found = held ?? null;
  while (found && isSameStep(found.beat, now)) found = found.before;
  return found;
}

/** The variables that outlive a tile: set before the walk began. All others belong to one tile. */
export function isKept(name: string, program: Program): boolean {
  return program.stages.some((stage) => stage.kind === "start" && stage.moments.some((m) => name in m.sets));
}

/** Is the variable there at this moment, or is it left over from a tile that the walk has left? */
export function isThere(name: string, held: Held | undefined, now: Beat): boolean {
  if (!held) return false;
  return isSameStep(held.beat, now) || held.beat.stage.kind !== "step" || isKept(name, now.program);
}

/** The first moment of the next or previous stage; at the ends, the last or first moment. */
export function stageFrom(beats: Beat[], position: number, step: 1 | -1): number {
  const now = beats[position];
  if (!now) return 0;
  if (step === 1) {
    const next = beats.findIndex((beat, i) => i > position && beat.stage !== now.stage);
    return next < 0 ? beats.length - 1 : next;
  }
  let first = position;
  while (first > 0 && beats[first - 1]!.stage === now.stage) first--;
  if (first < position) return first;
  if (first === 0) return 0;
  const before = beats[first - 1]!.stage;
  first--;
  while (first > 0 && beats[first - 1]!.stage === before) first--;
  return first;
}

// ---- The end of a scale of colours: what most numbers lie below, so that a few large ones do not bleach the rest.

const MOST = 0.985;
const ends = new WeakMap<Pass, Map<string, number>>();

/** Of a variable, one scale for all its moments in a pass. */
export function largestOf(pass: Pass, name: string): number {
  let known = ends.get(pass);
  if (!known) {
    known = new Map();
    ends.set(pass, known);
  }
  let found = known.get(name);
  if (found === undefined) {
    const indices = new Set(beatsOf(pass).map((beat) => beat.moment.sets[name]));
    found = endOf([...indices].filter((index) => index !== undefined).map(matrix));
    known.set(name, found);
  }
  return found;
}

const wholes = new WeakMap<Matrix, number>();

export function largest(x: Matrix): number {
  let found = wholes.get(x);
  if (found === undefined) {
    found = endOf([x]);
    wholes.set(x, found);
  }
  return found;
}

function endOf(all: Matrix[]): number {
  const sizes = all
    .flatMap((x) => Array.from(x.data, Math.abs))
    .filter((size) => size > 0 && size < Infinity);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor((sizes.length - 1) * MOST)] ?? 0;
}
