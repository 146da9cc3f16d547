// Weights of all pairs of words, small, with the words on demand: the inspector names them.

import type { JSX } from "preact";
import { pick } from "../app_state";
import { Heat } from "../Heat";
import { matrix, type Index } from "../recording";

/** The side of a cell of a matrix that fits into the room. */
export function cellFor(room: number, rows: number, columns: number): number {
  return Math.max(2, Math.min(22, Math.floor((room / Math.max(rows, columns)) * 4) / 4));
}

export function WeightsFigure(props: {
  name: string;
  label: string;
  index: Index;
  room: number;
  high: number;
}): JSX.Element {
  const values = matrix(props.index);
  const cell = cellFor(props.room, values.rows, values.columns);
  return (
    <Heat
      name={`weights-${props.name}`}
      label={props.label}
      values={values}
      kind="weight"
      high={props.high}
      width={cell}
      height={cell}
      onPick={(row, column, aloud) =>
        pick({ of: "weights", name: "P", index: props.index, row, column }, aloud)
      }
    />
  );
}
