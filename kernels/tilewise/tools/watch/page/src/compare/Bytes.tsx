// What the matrix would have cost, at any length, beside what a program holds.

import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";
import * as Plot from "@observablehq/plot";
import { bytes } from "../format";
import { recording } from "../recording";
import { Chart } from "./chart";

const SMALLEST = 7; // 2 to this power: 128
const LARGEST = 17; // 131072
const FP32 = 4;

/** What a program of the forward holds at once: its tiles of Q, K, V and O, S, and two numbers a row. */
export function heldByProgram(): number {
  const pass = recording.passes.find((each) => each.name === "forward" || each.name === "splits");
  const [tileQ, tileK] = pass?.tile ?? [0, 0];
  const [dim, valueDim] = [recording.call.q[3] ?? 0, recording.call.v[3] ?? 0];
  const { element } = recording.compare.bytes;
  const read = (tileQ * dim + tileK * (dim + valueDim)) * element;
  return read + (tileQ * tileK + tileQ * valueDim + 2 * tileQ) * FP32;
}

export function matrixBytes(length: number): number {
  const { heads, element } = recording.compare.bytes;
  return heads * length * length * element;
}

export function Bytes(): JSX.Element {
  const [power, setPower] = useState(LARGEST);
  const length = 2 ** power;
  const { heads, element } = recording.compare.bytes;
  const held = heldByProgram();
  const options = useMemo<Plot.PlotOptions>(() => {
    const lengths = Array.from({ length: LARGEST - SMALLEST + 1 }, (_, i) => 2 ** (SMALLEST + i));
    const lines = [
      ...lengths.map((n) => ({ n, size: matrixBytes(n), what: "the matrix" })),
      ...lengths.map((n) => ({ n, size: held, what: "a program" })),
    ];
    const ends = lines.filter((each) => each.n === lengths.at(-1));
    return {
      x: {
        type: "log",
        base: 2,
        label: "length N →",
        tickFormat: (n: number) => (n >= 1024 ? `${n / 1024}k` : String(n)),
        ticks: lengths.filter((_, i) => i % 2 === 0),
      },
      y: {
        type: "log",
        label: "↑ bytes",
        grid: true,
        tickFormat: (n: number) => bytes(n).replace(/\.\d+/, ""),
        ticks: [2 ** 10, 2 ** 20, 2 ** 30, 2 ** 40],
        domain: [2 ** 10, Math.max(2 ** 40, matrixBytes(2 ** LARGEST))],
      },
      marks: [
        Plot.line(lines, {
          x: "n",
          y: "size",
          z: "what",
          stroke: (each) => (each.what === "the matrix" ? "var(--accent)" : "var(--blue)"),
          strokeWidth: 2,
        }),
        Plot.text(ends, { x: "n", y: "size", text: "what", dx: 6, textAnchor: "start", fill: "var(--ink)" }),
        Plot.ruleX([length], { stroke: "var(--faint)", strokeDasharray: "3 3" }),
        Plot.dot(
          [
            { n: length, size: matrixBytes(length) },
            { n: length, size: held },
          ],
          { x: "n", y: "size", fill: "var(--ink)", r: 4 },
        ),
      ],
    };
  }, [length]);
  return (
    <section class="figure" aria-labelledby="bytes-title">
      <div class="figure-head">
        <h2 id="bytes-title">What the matrix would have cost</h2>
        <p>
          {heads} {heads === 1 ? "head" : "heads"} × N² × {element} bytes, against what one program holds: its
          tiles of Q, K, V and O, one tile of scores, and two numbers a row.
        </p>
      </div>
      <div class="controls">
        <label class="choice wide">
          <span>Length N = {length.toLocaleString("en")}</span>
          <input
            type="range"
            min={SMALLEST}
            max={LARGEST}
            value={power}
            aria-valuetext={`N = ${length}`}
            onInput={(event) => setPower(Number(event.currentTarget.value))}
          />
        </label>
      </div>
      <p class="two-numbers">
        <span>
          <b class="matrix-bytes">{bytes(matrixBytes(length))}</b> for the N × N matrix
        </span>
        <span>
          <b>{bytes(held)}</b> for a program, at any N
        </span>
      </p>
      <Chart
        label="Bytes of the matrix of scores and of one program, by length"
        options={options}
        height={260}
      />
    </section>
  );
}
