// The matrices beside the map: what is read, whole, and what the programs build, as far as they have come.

import type { JSX } from "preact";
import { now, pass as passNow, pick, position } from "./app_state";
import { Heat, Picture } from "./Heat";
import { Cells } from "./Cells";
import { RESULT, type Geometry, type Strip } from "./map_geometry";
import { kindOf, symbolOf } from "./names";
import { placeOf } from "./axes";
import { matrix, tensor, type Matrix, type Pass } from "./recording";
import { crop } from "./crop";
import { beatsOf, largest, type Beat } from "./walk";

type Side = "left" | "top" | "right" | "bottom";

/** Q, K, V or dO: a whole tensor at one side. */
export function Whole({
  strip,
  side,
  geometry,
}: {
  strip: Strip;
  side: Side;
  geometry: Geometry;
}): JSX.Element | null {
  const values = tensor(strip.name, passNow.value);
  if (!values) return null;
  const isTop = side === "top";
  const thin = strip.size / Math.max(1, values.columns);
  const place = isTop ? { left: geometry.x, top: strip.at } : { left: strip.at, top: geometry.y };
  return (
    <div class="strip" style={place}>
      <Caption name={strip.name} side={side} />
      <Heat
        name={strip.name}
        label={`${symbolOf(strip.name)}, the whole tensor`}
        values={values}
        kind={kindOf(strip.name, values.type)}
        high={largest(values)}
        width={isTop ? geometry.cell : thin}
        height={isTop ? thin : geometry.line}
        isTransposed={isTop}
        onPick={(row, column, aloud) => pick({ of: "tensor", name: strip.name, row, column }, aloud)}
      />
    </div>
  );
}

interface Part {
  beat: Beat; // that set it last
  first: number; // row or key
  count: number;
  values: Matrix;
}

/** What each program, and each role of it, has of a variable up to the present moment. */
function partsBy(pass: Pass, name: string, until: number): Part[] {
  const latest = new Map<string, Beat>();
  for (const beat of beatsOf(pass)) {
    if (beat.position > until) break;
    if (name in beat.moment.sets) latest.set(`${beat.programAt} ${beat.moment.role ?? ""}`, beat);
  }
  const parts = [...latest.values()].map((beat) => {
    const values = matrix(beat.moment.sets[name]!);
    const axis = beat.program.walks === "rows" ? "key" : "row";
    const first = placeOf(axis, 0, beat, pass);
    return { beat, first, count: Math.max(0, Math.min(values.rows, beat.program.owns[1] - first)), values };
  });
  return parts.filter((part) => part.count > 0);
}

/** O, dQ, dK or dV: a part for each program that has begun. */
export function Growing({
  strip,
  side,
  geometry,
}: {
  strip: Strip;
  side: Side;
  geometry: Geometry;
}): JSX.Element | null {
  const pass = passNow.value!;
  const values = tensor(RESULT[strip.name] ?? strip.name, pass);
  if (!values) return null;
  const isBottom = side === "bottom";
  const thin = strip.size / Math.max(1, values.columns);
  const { cell, line } = geometry;
  const length = isBottom ? geometry.keys : geometry.rows;
  const place = isBottom ? { left: geometry.x, top: strip.at } : { left: strip.at, top: geometry.y };
  const parts = partsBy(pass, strip.name, position.value);
  const choose = (row: number, column: number, aloud: boolean): void => {
    const [i, j] = isBottom ? [column, row] : [row, column];
    const found = parts.findLast((part) => i >= part.first && i < part.first + part.count);
    const isMine =
      found?.beat.program === now.value!.program && found.beat.moment.role === now.value!.moment.role;
    if (found && isMine) pick({ of: "variable", name: strip.name, row: i - found.first, column: j }, aloud);
    else if (found) pick({ of: "tensor", name: RESULT[strip.name] ?? strip.name, row: i, column: j }, aloud);
  };
  return (
    <div class="strip growing" style={place}>
      <Caption name={strip.name} side={side} />
      <Cells
        label={`${symbolOf(strip.name)}, as far as it has been computed`}
        rows={isBottom ? values.columns : length}
        columns={isBottom ? length : values.columns}
        width={isBottom ? cell : thin}
        height={isBottom ? thin : line}
        onPick={choose}
      >
        {parts.map(({ beat, first, count, values: part }) => (
          <div
            key={`${beat.programAt} ${beat.moment.role ?? ""}`}
            class="part"
            style={isBottom ? { left: first * cell, top: 0 } : { left: 0, top: first * line }}
          >
            <Picture
              name={`${strip.name}-part`}
              values={crop(part, count)}
              kind="signed"
              high={largest(values)}
              width={isBottom ? cell : thin}
              height={isBottom ? thin : line}
              isTransposed={isBottom}
            />
          </div>
        ))}
      </Cells>
    </div>
  );
}

function Caption({ name, side }: { name: string; side: Side }): JSX.Element {
  const isAcross = side === "top" || side === "bottom";
  return (
    <span class={`strip-name ${side}`}>
      {symbolOf(name)}
      {isAcross && "ᵀ"}
    </span>
  );
}
