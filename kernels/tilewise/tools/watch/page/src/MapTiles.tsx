// The tiles of the map: skipped, cut or full, and the way that the current program walks over them.

import type { JSX } from "preact";
import type { Geometry } from "./map_geometry";
import type { Pass, Program, Stage } from "./recording";
import { stepsOf } from "./walk";

const STATES: Record<string, string> = { ".": "skipped", "%": "cut", "#": "full" };

export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

/** The place of a tile; the last ones may be smaller. */
export function boxOf(pass: Pass, geometry: Geometry, row: number, column: number): Box {
  const [tileQ, tileK] = pass.tile;
  const { cell, line, rows, keys } = geometry;
  // A tile may lie beyond the end altogether: rows of a warpgroup that has none.
  const stop = (first: number, tile: number, end: number): number =>
    Math.max(first, Math.min(first + tile, end));
  return {
    left: column * tileK * cell,
    top: row * tileQ * line,
    width: (stop(column * tileK, tileK, keys) - column * tileK) * cell,
    height: (stop(row * tileQ, tileQ, rows) - row * tileQ) * line,
  };
}

export function countTiles(grid: string[]): { skipped: number; cut: number; full: number } {
  const all = grid.join("");
  const count = (sign: string): number => all.split(sign).length - 1;
  return { skipped: count("."), cut: count("%"), full: count("#") };
}

/** The three patterns, for the map and its key. `id` keeps two drawings on one page apart. */
export function Patterns({ id }: { id: string }): JSX.Element {
  return (
    <defs>
      <pattern
        id={`${id}-cut`}
        width="6"
        height="6"
        patternUnits="userSpaceOnUse"
        patternTransform="rotate(45)"
      >
        <rect class="tint" width="6" height="6" />
        <rect class="hatch" width="2" height="6" />
      </pattern>
      <pattern id={`${id}-skipped`} width="9" height="9" patternUnits="userSpaceOnUse">
        <circle class="dot" cx="4.5" cy="4.5" r="0.9" />
      </pattern>
      <marker
        id={`${id}-tip`}
        viewBox="0 0 8 8"
        refX="6"
        refY="4"
        markerWidth="5"
        markerHeight="5"
        orient="auto"
      >
        <path class="tip" d="M0 0 L8 4 L0 8 z" />
      </marker>
    </defs>
  );
}

export function fillOf(sign: string, id: string): { class: string; fill?: string } {
  const state = STATES[sign] ?? "skipped";
  return state === "full" ? { class: "tile full" } : { class: `tile ${state}`, fill: `url(#${id}-${state})` };
}

export function Tiles({ pass, geometry, id }: { pass: Pass; geometry: Geometry; id: string }): JSX.Element {
  return (
    <>
      {pass.grid.flatMap((line, row) =>
        [...line].map((sign, column) => {
          const box = boxOf(pass, geometry, row, column);
          return (
            <rect
              key={`${row} ${column}`}
              {...fillOf(sign, id)}
              x={box.left + 0.75}
              y={box.top + 0.75}
              width={Math.max(1, box.width - 1.5)}
              height={Math.max(1, box.height - 1.5)}
              rx="2"
            />
          );
        }),
      )}
    </>
  );
}

/** A number for each step of a program, and a line through them in order. */
export function Walk({
  pass,
  geometry,
  program,
  role,
  here,
  id,
}: {
  pass: Pass;
  geometry: Geometry;
  program: Program;
  role: string | undefined;
  here: Stage["tile"]; // the tile of this moment
  id: string;
}): JSX.Element {
  const steps = stepsOf(program, role).filter((each) => each.tile);
  const boxes = steps.map((each) => boxOf(pass, geometry, ...each.tile!));
  const middle = boxes.map((box) => [box.left + box.width / 2, box.top + box.height / 2] as const);
  const isLarge = boxes.every((box) => box.width >= 18 && box.height >= 18);
  return (
    <g class="walk">
      {middle.length > 1 && (
        <polyline points={middle.map((each) => each.join(",")).join(" ")} marker-end={`url(#${id}-tip)`} />
      )}
      {isLarge &&
        middle.map(([x, y], i) =>
          String(steps[i]!.tile) === String(here) ? null : ( // its numbers are shown
            <g key={i}>
              <circle cx={x} cy={y} r="8" />
              <text x={x} y={y} text-anchor="middle" dominant-baseline="central">
                {i + 1}
              </text>
            </g>
          ),
        )}
    </g>
  );
}
