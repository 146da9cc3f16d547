// The softmax of a row twice: with all its scores at once, and as the kernel does it.

import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";
import * as Plot from "@observablehq/plot";
import { short } from "../format";
import { recording } from "../recording";
import { Chart } from "./chart";
import { stepsOfRow } from "./online_steps";
import { RowChoice } from "./RowChoice";

export function Online(): JSX.Element {
  const { queries, keys } = recording.words;
  const [row, setRow] = useState(queries.length - 1);
  const steps = useMemo(() => stepsOfRow(row), [row]);
  const [taken, setTaken] = useState(steps.length);
  const shown = Math.min(taken, steps.length);
  const seen = steps.slice(0, shown);
  const options = useMemo<Plot.PlotOptions>(() => {
    const bars = steps.flatMap((step, i) =>
      step.scores.map((score, j) => ({
        key: step.keys[0] + j,
        score,
        isSeen: i < shown,
        isNow: i === shown - 1,
      })),
    );
    const finite = bars.filter((bar) => Number.isFinite(bar.score));
    return {
      x: {
        label: "key →",
        domain: [-0.5, keys.length - 0.5],
        ticks: keys.length <= 24 ? keys.length : 10,
        tickFormat: (j: number) => (keys.length <= 24 ? (keys[j] ?? "") : String(j)),
      },
      y: { label: "↑ score", grid: true },
      marks: [
        Plot.ruleY([0], { stroke: "var(--line)" }),
        Plot.rectY(finite, {
          x1: (bar) => bar.key - 0.4,
          x2: (bar) => bar.key + 0.4,
          y: "score",
          fill: (bar) => (bar.isNow ? "var(--accent)" : bar.isSeen ? "var(--blue)" : "var(--quiet)"),
          title: (bar) => `${keys[bar.key]}: ${short(bar.score)}`,
        }),
        Plot.ruleY(shown > 0 && Number.isFinite(seen.at(-1)!.rowMax) ? [seen.at(-1)!.rowMax] : [], {
          stroke: "var(--accent)",
          strokeDasharray: "5 4",
        }),
        Plot.text(shown > 0 && Number.isFinite(seen.at(-1)!.rowMax) ? [seen.at(-1)!.rowMax] : [], {
          x: keys.length - 0.5,
          y: (max: number) => max,
          text: () => "row_max so far",
          textAnchor: "end",
          dy: -8,
          fill: "var(--ink)",
        }),
      ],
    };
  }, [steps, shown]);
  return (
    <section class="figure whole" aria-labelledby="online-title">
      <div class="figure-head">
        <h2 id="online-title">All scores at once, or a tile at a time</h2>
        <p>
          A plain softmax needs all scores of a row before it can divide: grey bars still missing, it must
          wait. The online softmax goes on with two numbers, and takes a tile's scores only once.
        </p>
      </div>
      <div class="controls">
        <RowChoice
          row={row}
          words={queries}
          choose={(next) => {
            setRow(next);
            setTaken(stepsOfRow(next).length);
          }}
        />
        <label class="choice wide">
          <span>
            Tiles taken in: {shown} of {steps.length}
          </span>
          <input
            type="range"
            min="0"
            max={steps.length}
            value={shown}
            onInput={(event) => setTaken(Number(event.currentTarget.value))}
          />
        </label>
      </div>
      <div class="chart-and-table">
        <Chart
          label={`Scores of the row “${queries[row]}”, tile by tile`}
          options={options}
          height={280}
          right={16}
        />
        <div class="scroller" tabIndex={0} role="region" aria-label="The state after each tile">
          <table class="state">
            <caption>What the kernel remembers of the row after each tile</caption>
            <thead>
              <tr>
                <th scope="col">tile</th>
                <th scope="col">keys</th>
                <th scope="col">row_max</th>
                <th scope="col">rescale</th>
                <th scope="col">row_sum</th>
                <th scope="col">numbers held, online</th>
                <th scope="col">scores held, plain</th>
              </tr>
            </thead>
            <tbody>
              {steps.map((step, i) => (
                <tr key={i} class={i === shown - 1 ? "on" : i < shown ? "" : "later"}>
                  <th scope="row">{i + 1}</th>
                  <td>
                    {step.keys[0]}–{step.keys[1] - 1}
                  </td>
                  <td>{i < shown ? short(step.rowMax) : ""}</td>
                  <td>{i < shown ? short(step.rescale) : ""}</td>
                  <td>{i < shown ? short(step.rowSum) : ""}</td>
                  <td>{i < shown ? "2" : ""}</td>
                  <td>
                    {i < shown
                      ? steps.slice(0, i + 1).reduce((sum, each) => sum + each.scores.length, 0)
                      : ""}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </div>
    </section>
  );
}
