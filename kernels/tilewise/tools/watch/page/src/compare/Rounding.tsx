// How far O is from float64's as keys are taken in, for each dtype.

import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";
import * as Plot from "@observablehq/plot";
import { at, matrix, recording } from "../recording";
import { Chart } from "./chart";
import { RowChoice } from "./RowChoice";

const WORST = -1;
const DASHES = ["", "7 4", "2 4", "9 3 2 3"];
const INKS = ["var(--blue)", "var(--accent)", "var(--ink)", "var(--faint)"];

interface Point {
  dtype: string;
  keys: number;
  error: number;
}

/** The error of a row, or of the worst row, after each step; 0 cannot be drawn on a logarithmic axis. */
export function pointsOf(row: number): Point[] {
  return recording.compare.rounding.flatMap(({ dtype, keys, error }) => {
    const values = matrix(error);
    return keys.flatMap((count, step) => {
      const all = Array.from({ length: values.columns }, (_, i) => at(values, step, i));
      const found = row === WORST ? Math.max(...all.filter((each) => !Number.isNaN(each)), 0) : all[row]!;
      return found > 0 ? [{ dtype, keys: count, error: found }] : [];
    });
  });
}

/** The ends of tiles, without one that would touch the last; of many, whatever the chart chooses. */
function ticksOf(keys: number[]): number[] | number {
  if (keys.length > 8) return 8;
  const last = keys.at(-1)!;
  return keys.filter((each) => each === last || last - each > 0.08 * last);
}

export function Rounding(): JSX.Element {
  const { rounding } = recording.compare;
  const [row, setRow] = useState(WORST);
  const options = useMemo<Plot.PlotOptions>(() => {
    const points = pointsOf(row);
    return {
      x: {
        label: "keys taken in →",
        domain: [0, Math.max(...rounding.flatMap((each) => each.keys))],
        tickFormat: "d",
        ticks: ticksOf(rounding[0]!.keys),
      },
      y: { type: "log", label: "↑ largest |O / row_sum − float64's|", grid: true, tickFormat: ".0e" },
      marks: rounding.flatMap(({ dtype }, i) => {
        const mine = points.filter((each) => each.dtype === dtype);
        return [
          Plot.line(mine, {
            x: "keys",
            y: "error",
            stroke: INKS[i % INKS.length]!,
            strokeWidth: 2,
            strokeDasharray: DASHES[i % DASHES.length]!,
          }),
          Plot.dot(mine, {
            x: "keys",
            y: "error",
            fill: INKS[i % INKS.length]!,
            r: 3,
            title: (each: Point) => `${dtype}, ${each.keys} keys: ${each.error.toExponential(2)}`,
          }),
          Plot.text(mine.slice(-1), {
            x: "keys",
            y: "error",
            text: "dtype",
            dx: 9,
            textAnchor: "start",
            fill: "var(--ink)",
          }),
        ];
      }),
    };
  }, [row]);
  return (
    <section class="figure" aria-labelledby="rounding-title">
      <div class="figure-head">
        <h2 id="rounding-title">Rounding, as keys go by</h2>
        <p>
          The same call in each dtype beside float64. Sums are kept in fp32 whatever the dtype, so errors do
          not pile up with every key.
        </p>
      </div>
      <div class="controls">
        <RowChoice row={row} words={recording.words.queries} choose={setRow}>
          <option value={String(WORST)}>the worst row</option>
        </RowChoice>
      </div>
      <Chart
        label="Largest error of a row by keys taken in, a line for each dtype"
        options={options}
        height={280}
      />
    </section>
  );
}
