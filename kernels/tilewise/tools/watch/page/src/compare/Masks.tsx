// The same words with and without the mask: what is weighed, and which tiles are visited at all.

import type { JSX } from "preact";
import { fillOf, Patterns } from "../MapTiles";
import { recording } from "../recording";
import { useWidth } from "../useWidth";
import { WeightsFigure } from "./WeightsFigure";

export function Masks(): JSX.Element {
  const { mask } = recording.compare;
  const [box, width] = useWidth(900);
  const room = width < 640 ? Math.min(300, width - 16) : Math.min(340, (width - 40) / mask.length);
  return (
    <section class="figure" aria-labelledby="masks-title">
      <div class="figure-head">
        <h2 id="masks-title">With the mask, and without</h2>
        <p>A mask does not only hide keys: tiles that it hides whole are never loaded, and never cost anything.</p>
      </div>
      <div class="side-by-side" ref={box}>
        {mask.map((each, i) => (
          <div key={each.name} class="panel">
            <h3>{each.name}</h3>
            <p>
              {each.visited} of {each.total} tiles visited
            </p>
            <WeightsFigure name={`mask-${i}`} label={`Weights, ${each.name}`} index={each.weights} room={room} high={1} />
            <Grid lines={each.grid} id={`mask${i}`} label={`${each.name}: ${each.visited} of ${each.total} tiles visited`} />
          </div>
        ))}
      </div>
    </section>
  );
}

function Grid({ lines, id, label }: { lines: string[]; id: string; label: string }): JSX.Element {
  const columns = lines[0]?.length ?? 0;
  const side = Math.max(8, Math.min(22, Math.floor(220 / Math.max(columns, lines.length))));
  return (
    <svg class="grid" width={columns * side} height={lines.length * side} role="img" aria-label={label}>
      <Patterns id={id} />
      {lines.flatMap((line, i) =>
        [...line].map((sign, j) => (
          <rect key={`${i} ${j}`} {...fillOf(sign, id)} x={j * side + 1} y={i * side + 1} width={side - 2} height={side - 2} rx="2" />
        )),
      )}
    </svg>
  );
}
