// Three ways to say how alike a query and a key are, on the same words.

import type { JSX } from "preact";
import { Legend } from "../Legend";
import { recording } from "../recording";
import { useWidth } from "../useWidth";
import { WeightsFigure } from "./WeightsFigure";

const NAMES: Record<string, [string, string]> = {
  "dot product": ["Dot product", "Long vectors win: a large score makes all others vanish."],
  "scaled dot product": ["Scaled dot product", "Divided by √head_dim, so that scores do not grow with it."],
  cosine: ["Cosine", "Lengths do not count, only directions."],
};

export function Similarities(): JSX.Element {
  const { similarity } = recording.compare;
  const [box, width] = useWidth(900);
  const room =
    width < 640
      ? Math.min(300, width - 16)
      : Math.min(340, (width - 24 * similarity.length) / similarity.length);
  return (
    <section class="figure whole" aria-labelledby="similarity-title">
      <div class="figure-head">
        <h2 id="similarity-title">Three similarities, the same words</h2>
        <p>Rows are queries, columns keys; each row's weights sum to 1. Point at a cell for its two words.</p>
      </div>
      <div class="side-by-side" ref={box}>
        {similarity.map((each) => {
          const [title, text] = NAMES[each.name] ?? [each.name, ""];
          return (
            <div key={each.name} class="panel">
              <h3>{title}</h3>
              <p class="equation">{each.equation}</p>
              <WeightsFigure
                name={each.name}
                label={`Weights by ${title}`}
                index={each.weights}
                room={room}
                high={1}
              />
              <p>{text}</p>
            </div>
          );
        })}
      </div>
      <p class="legends">
        <Legend kind="weight" high={1} text="weights" />
      </p>
    </section>
  );
}
