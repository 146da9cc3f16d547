// The same words with and without the mask: what is weighed, and which tiles are visited at all.

import type { JSX } from "preact";
import { fillOf, Patterns } from "../MapTiles";
import { recording } from "../recording";
import { useWidth } from "../useWidth";
import { cellFor, WeightsFigure } from "./WeightsFigure";

export function Masks(): JSX.Element {
  const { mask } = recording.compare;
  const [box, width] = useWidth(900);
  const room = width < 640 ? Math.min(300, (width - 20) / 2) : Math.min(330, (width - 96) / mask.length / 2);
  return (
    <section class="figure whole" aria-labelledby="masks-title">
      <div class="figure-head">
        <h2 id="masks-title">With the mask, and without</h2>
        <p>
          A mask does not only hide keys: tiles that it hides whole are never loaded, and never cost anything.
        </p>
      </div>
      <div class="side-by-side" ref={box}>
        {mask.map((each, i) => (
          <div key={each.name} class="panel">
            <h3>{each.name}</h3>
            <p>
              {each.visited} of {each.total} tiles visited
            </p>
            <div class="pictures">
              <WeightsFigure
                name={`mask-${i}`}
                label={`Weights, ${each.name}`}
                index={each.weights}
                room={room}
                high={1}
              />
              <Grid
                lines={each.grid}
                id={`mask${i}`}
                room={room}
                label={`${each.name}: ${each.visited} of ${each.total} tiles visited`}
              />
            </div>
          </div>
        ))}
      </div>
    </section>
  );
}

/** The tiles on the same scale as the weights beside them. */
function Grid({
  lines,
  id,
  label,
  room,
}: {
  lines: string[];
  id: string;
  label: string;
  room: number;
}): JSX.Element {
  const pass = recording.passes.find((each) => each.name === "forward");
  const [rows, keys] = pass?.lengths ?? [lines.length, lines[0]?.length ?? 1];
  const [tileQ, tileK] = pass?.tile ?? [1, 1];
  const cell = cellFor(room, rows, keys);
  const span = (i: number, tile: number, end: number): number =>
    Math.max(3, (Math.min((i + 1) * tile, end) - i * tile) * cell - 2);
  return (
    <svg class="grid" width={keys * cell} height={rows * cell} role="img" aria-label={label}>
      <Patterns id={id} />
      {lines.flatMap((line, i) =>
        [...line].map((sign, j) => (
          <rect
            key={`${i} ${j}`}
            {...fillOf(sign, id)}
            x={j * tileK * cell + 1}
            y={i * tileQ * cell + 1}
            width={span(j, tileK, keys)}
            height={span(i, tileQ, rows)}
            rx="2"
          />
        )),
      )}
    </svg>
  );
}
