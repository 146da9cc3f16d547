// Where everything of the map lies, in pixels, for the room that there is.

import type { Pass, PassName } from "./recording";
import { tensor } from "./recording";

/** Which matrices stand at which side of the scores. What a program builds stands right of them or below. */
interface Sides {
  left: string[];
  top: string[];
  right: string[];
  bottom: string[];
}

const FORWARD: Sides = { left: ["q"], top: ["k", "v"], right: ["o"], bottom: [] };

const SIDES: Record<PassName, Sides> = {
  forward: FORWARD,
  splits: FORWARD,
  hopper: FORWARD,
  combine: { left: [], top: [], right: ["o"], bottom: [] },
  dkv: { left: ["q", "dout"], top: ["k", "v"], right: [], bottom: ["dk", "dv"] },
  dq: { left: ["q", "dout"], top: ["k", "v"], right: ["dq"], bottom: [] },
};

/** The tensor that a variable of this name becomes. */
export const RESULT: Record<string, string> = { o: "out", dq: "dq", dk: "dk", dv: "dv" };

export interface Strip {
  name: string;
  columns: number; // of the matrix
  at: number; // left or top edge
  size: number; // its extent across
}

export interface Geometry {
  cell: number; // a score's width
  line: number; // its height: the same, but where rows are few
  button: number; // room for the button of a program
  rows: number;
  keys: number;
  x: number; // of the score matrix
  y: number;
  width: number; // of everything
  height: number;
  label: number; // room for the words of rows
  left: Strip[];
  top: Strip[];
  right: Strip[];
  bottom: Strip[];
  gutter: number; // where the buttons of programs begin: x for rows, y for keys
}

const GAP = 8;
const CAPTION = 16;
const BUTTON = 34;
const FEWEST = 110; // pixels in height, if rows need not be thicker than a word for it

export function geometryOf(pass: Pass, room: number): Geometry {
  const [rows, keys] = pass.lengths;
  const sides = SIDES[pass.name];
  const isNarrow = room < 480;
  const label = isNarrow ? 52 : 76;
  const strip = isNarrow ? 30 : 52;
  const byRows = pass.programs[0]?.walks !== "rows";
  const acrossRow = sides.left.length + sides.right.length;
  const buttons =
    BUTTON *
    Math.max(
      1,
      ...pass.programs.map((one) => pass.programs.filter((each) => each.owns[0] === one.owns[0]).length),
    );
  const taken = label + acrossRow * (strip + GAP) + (byRows ? buttons + GAP : 0) + 4;
  const cell = Math.max(2, Math.min(24, Math.floor(((room - taken) / keys) * 4) / 4));
  const line = Math.max(cell, Math.min(18, FEWEST / rows));

  const columnsOf = (name: string): number => tensor(RESULT[name] ?? name, pass)?.columns ?? 0;
  const place = (names: string[], from: number): Strip[] =>
    names.map((name, i) => ({ name, columns: columnsOf(name), at: from + i * (strip + GAP), size: strip }));
  const topWords = label;
  const left = place(sides.left, label);
  const x = label + sides.left.length * (strip + GAP);
  const y = topWords + sides.top.length * (strip + GAP) + CAPTION;
  const right = place(sides.right, x + keys * cell + GAP);
  const bottom = place(sides.bottom, y + rows * line + GAP);
  const endX = x + keys * cell + sides.right.length * (strip + GAP);
  const endY = y + rows * line + sides.bottom.length * (strip + GAP);
  return {
    cell,
    line,
    button: BUTTON,
    rows,
    keys,
    x,
    y,
    label,
    left,
    top: place(sides.top, topWords),
    right,
    bottom,
    gutter: (byRows ? endX : endY) + GAP,
    width: endX + (byRows ? GAP + buttons : 0) + 2,
    height: endY + (byRows ? 0 : GAP + buttons) + 2,
  };
}
