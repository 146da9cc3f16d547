// What the kernel did with one row, tile by tile, taken from the recording of the forward pass.

import { at, matrix, recording, type Pass, type Stage } from "../recording";

export interface OnlineStep {
  keys: [number, number];
  scores: number[]; // of the row; -inf where masked
  rowMax: number;
  rowSum: number;
  rescale: number;
}

export function stepsOfRow(row: number): OnlineStep[] {
  const pass = recording.passes.find((each) => each.name === "forward")!;
  const program = pass.programs.find((each) => row >= each.owns[0] && row < each.owns[1]);
  if (!program) return [];
  const local = row - program.owns[0];
  return program.stages.filter((stage) => stage.tile).map((stage) => stepOf(stage, local, pass));
}

function stepOf(stage: Stage, local: number, pass: Pass): OnlineStep {
  const first = stage.tile![1] * pass.tile[1];
  const stop = Math.min(first + pass.tile[1], pass.lengths[1]);
  const scores = last(stage, "s");
  const number = (name: string): number => {
    const index = last(stage, name);
    return index === null ? NaN : (matrix(index).data[local] ?? NaN);
  };
  return {
    keys: [first, stop],
    scores:
      scores === null ? [] : Array.from({ length: stop - first }, (_, j) => at(matrix(scores), local, j)),
    rowMax: number("row_max"),
    rowSum: number("row_sum"),
    rescale: number("rescale"),
  };
}

function last(stage: Stage, name: string): number | null {
  let found: number | null = null;
  for (const moment of stage.moments) found = moment.sets[name] ?? found;
  return found;
}
