// One matrix of a step with its name, its words, and the frame that says whether it was just set.

import type { JSX } from "preact";
import { pick } from "./app_state";
import { axesOf, isBeyond, placeOf, wordAt, type Axis } from "./axes";
import { Heat } from "./Heat";
import { kindOf, meaningOf, symbolOf } from "./names";
import { matrix, type Matrix, type Pass } from "./recording";
import type { Slot } from "./recipes";
import type { Sizes } from "./step_sizes";
import { atStageStart, isThere, largestOf, type Beat, type Held, type State } from "./walk";

interface Props {
  slot: Slot;
  pass: Pass;
  now: Beat;
  state: State;
  sizes: Sizes;
}

/** The shape that a variable will have, from wherever the pass sets it: its place is kept before it is set. */
function shapeAhead(name: string, pass: Pass): Matrix | null {
  for (const program of pass.programs)
    for (const stage of program.stages)
      for (const moment of stage.moments) {
        const index = moment.sets[name];
        if (index !== undefined) return matrix(index);
      }
  return null;
}

export function MatrixFigure({ slot, pass, now, state, sizes }: Props): JSX.Element | null {
  const { name, isTransposed = false } = slot;
  const held = state.get(name);
  const shown: Held | null =
    slot.when === "before" ? atStageStart(held, now) : isThere(name, held, now) ? held! : null;
  const like = shown ? matrix(shown.index) : shapeAhead(name, pass);
  if (!like) return null;
  const [rowAxis, columnAxis] = axesOf(name, like, pass);
  const sized = (axis: Axis, isWidth: boolean): number =>
    axis === "one"
      ? isWidth
        ? sizes.number
        : 15
      : axis === "dim"
        ? isWidth
          ? sizes.dim
          : sizes.thin
        : isWidth
          ? sizes.token
          : sizes.line;
  const [across, down] = isTransposed ? [rowAxis, columnAxis] : [columnAxis, rowAxis];
  const [width, height] = [sized(across, true), sized(down, false)];
  const [rows, columns] = isTransposed ? [like.columns, like.rows] : [like.rows, like.columns];
  const isStored = now.moment.stores.some((each) => each.variable === name);
  const isVector = like.rows === 1 || like.columns === 1;
  const isNew = slot.when !== "before" && (held?.beat === now || isStored);
  const inside = (axis: Axis, count: number): number => {
    let i = count;
    while (i > 0 && isBeyond(axis, placeOf(axis, i - 1, now, pass), pass)) i--;
    return i;
  };
  const title = slot.when === "before" ? `${name} before` : name;
  const words = (axis: Axis, count: number): string[] =>
    Array.from({ length: count }, (_, i) =>
      i < inside(axis, count) ? wordAt(axis, placeOf(axis, i, now, pass), pass) : "",
    );
  return (
    <figure
      class={`matrix ${isNew ? "new" : ""} ${isVector && down === "one" && isTransposed ? "flat" : ""}`}
      data-variable={slot.when === "before" ? `${name}:before` : name}
      data-transposed={isTransposed}
    >
      <figcaption title={meaningOf(name)}>
        <Caption
          name={name}
          isTransposed={isTransposed}
          isBefore={slot.when === "before"}
          isVector={isVector}
        />
        {!isVector && (
          <span class="size">
            {rows} × {columns}
          </span>
        )}
      </figcaption>
      {slot.labels === "top" && <TopWords words={words(across, columns)} width={width} room={sizes.label} />}
      <div class="beside">
        {slot.labels === "left" && (
          <SideWords words={words(down, rows)} height={height} room={sizes.label} side="left" />
        )}
        {shown ? (
          <Heat
            name={title}
            label={`${symbolOf(name)}${isTransposed ? " transposed" : ""}${slot.when ? " before this step" : ""}`}
            values={like}
            kind={kindOf(name, like.type)}
            high={
              kindOf(name, like.type) === "weight" && !["row_sum", "factor"].includes(name)
                ? 1
                : largestOf(pass, name)
            }
            width={width}
            height={height}
            isTransposed={isTransposed}
            valid={[inside(rowAxis, like.rows), inside(columnAxis, like.columns)]}
            onPick={(row, column, aloud) => pick({ of: "variable", name, row, column }, aloud)}
          />
        ) : (
          <div
            class="absent"
            style={{ width: columns * width, height: rows * height }}
            aria-label={`${symbolOf(name)}: not there at this moment`}
            role="img"
          />
        )}
        {slot.labels === "right" && (
          <SideWords words={words(down, rows)} height={height} room={sizes.label} side="right" />
        )}
      </div>
    </figure>
  );
}

function Caption(props: {
  name: string;
  isTransposed: boolean;
  isBefore: boolean;
  isVector: boolean;
}): JSX.Element {
  const symbol = symbolOf(props.name);
  if (props.isVector)
    return (
      <span class="vector">
        {props.name}
        {props.isBefore && <small>before</small>}
      </span>
    );
  return (
    <span class="symbol">
      {symbol}
      {props.isTransposed && "ᵀ"}
    </span>
  );
}

const LINE = 11; // pixels that a word needs

function SideWords(props: {
  words: string[];
  height: number;
  room: number;
  side: "left" | "right";
}): JSX.Element {
  const step = Math.max(1, Math.ceil(LINE / props.height));
  return (
    <div
      class={`side-words ${props.side}`}
      style={{ width: props.room, height: props.words.length * props.height }}
      aria-hidden="true"
    >
      {props.words.map((word, i) =>
        i % step === 0 ? (
          <span
            key={i}
            style={{ height: props.height * step, lineHeight: `${props.height * step}px` }}
            title={word}
          >
            {word}
          </span>
        ) : null,
      )}
    </div>
  );
}

function TopWords({ words, width, room }: { words: string[]; width: number; room: number }): JSX.Element {
  const step = Math.max(1, Math.ceil(LINE / width));
  return (
    <div class="top-words" style={{ height: room }} aria-hidden="true">
      {words.map((word, i) =>
        i % step === 0 ? (
          <span key={i} style={{ width: width * step, maxHeight: room }} title={word}>
            {word}
          </span>
        ) : null,
      )}
    </div>
  );
}
