// Inside a step: the tiles of this moment, arranged as their products are on paper.

import type { JSX } from "preact";
import { now as nowSignal, pass as passSignal, position, zoom } from "./app_state";
import { Legend } from "./Legend";
import { MatrixFigure } from "./MatrixFigure";
import { symbolOf } from "./names";
import { matrix, recording, type Pass } from "./recording";
import { placed, RECIPES, type Block, type Content, type Slot } from "./recipes";
import { sizesFor, type Sizes } from "./step_sizes";
import { useWidth } from "./useWidth";
import { isThere, largestOf, stateAt, type Beat, type State } from "./walk";

export function Step(): JSX.Element {
  const pass = passSignal.value!;
  const now = nowSignal.value!;
  const state = stateAt(pass, position.value);
  const [box, room] = useWidth(700);
  const dims = Math.max(recording.call.q[3] ?? 1, recording.call.v[3] ?? 1);
  const sizes = sizesFor(
    room,
    pass.name === "dkv" ? [pass.tile[1], pass.tile[0]] : pass.tile,
    dims,
    numbersBeside(pass),
    zoom.value,
  );
  const parts = { pass, now, state, sizes };
  const scores = pass.name === "dkv" ? "sT" : "s";
  return (
    <section class="figure step" aria-labelledby="step-title">
      <div class="figure-head">
        <h2 id="step-title">Inside the step</h2>
        <div class="zoom" role="group" aria-label="Size of the cells">
          <button
            type="button"
            aria-label="Smaller cells"
            disabled={zoom.value <= 0.75}
            onClick={() => (zoom.value /= 1.25)}
          >
            −
          </button>
          <button
            type="button"
            aria-label="Larger cells"
            disabled={zoom.value >= 3}
            onClick={() => (zoom.value *= 1.25)}
          >
            +
          </button>
        </div>
      </div>
      <div class="scroller" ref={box}>
        {RECIPES[pass.name].map((block) => (
          <BlockFigure key={block.title} block={block} isTitled={RECIPES[pass.name].length > 1} {...parts} />
        ))}
        <Shelf {...parts} />
      </div>
      <p class="legends">
        {largestOf(pass, scores) > 0 && (
          <Legend kind="signed" high={largestOf(pass, scores)} text={`${symbolOf(scores)}`} />
        )}
        <Legend kind="weight" high={1} text="weights" />
        <span class="legend">
          <span class="swatch-minus" aria-hidden="true" /> −∞: masked
        </span>
      </p>
    </section>
  );
}

/** How many lone columns of numbers stand at the left of a recipe. */
function numbersBeside(pass: Pass): number {
  const stacks = RECIPES[pass.name].flatMap((block) => block.rows.map((row) => row[0]));
  return Math.max(0, ...stacks.map((each) => (Array.isArray(each) && each.length > 1 ? each.length : 0)));
}

interface Parts {
  pass: Pass;
  now: Beat;
  state: State;
  sizes: Sizes;
}

/** Columns of numbers, which have no room beside the matrices of a phone. */
function isNumbers(content: Content): content is Slot[] {
  return Array.isArray(content) && content.length > 1 && content[0]?.labels === "left";
}

function BlockFigure({
  block,
  isTitled,
  ...parts
}: Parts & { block: Block; isTitled: boolean }): JSX.Element {
  const { isNarrow } = parts.sizes;
  const below = isNarrow ? block.rows.flat().filter(isNumbers) : [];
  return (
    <div class="block">
      {isTitled && <h3>{block.title}</h3>}
      <div class="product">
        {block.rows.flatMap((row, i) =>
          row.map((content, j) => (
            <div key={`${i} ${j}`} class={`place row-${i} column-${j} of-${block.rows.length}`}>
              <ContentFigure content={isNarrow && isNumbers(content) ? null : content} {...parts} />
            </div>
          )),
        )}
      </div>
      {below.map((content, i) => (
        <div key={i} class="place below">
          <ContentFigure content={content} {...parts} />
        </div>
      ))}
    </div>
  );
}

function ContentFigure({ content, ...parts }: Parts & { content: Content }): JSX.Element | null {
  if (content === null) return null;
  if (!Array.isArray(content)) {
    const isNow = content.of.some((name) => name in parts.now.moment.sets);
    return <p class={`corner ${isNow ? "on" : ""}`}>{content.equation}</p>;
  }
  return (
    <>
      {content.map((slot) => (
        <MatrixFigure key={`${slot.name} ${slot.when ?? ""}`} slot={slot} {...parts} />
      ))}
    </>
  );
}

/** Whatever else is there at this moment, of any name. */
function Shelf(parts: Parts): JSX.Element | null {
  const { pass, now, state, sizes } = parts;
  const known = placed(pass.name);
  const others = [...state].filter(
    ([name, held]) => !known.has(name) && (held.beat.stage === now.stage || isThere(name, held, now)),
  );
  if (others.length === 0) return null;
  const small: Sizes = {
    ...sizes,
    token: Math.min(sizes.token, 12),
    line: Math.min(sizes.line, 12),
    dim: Math.min(sizes.dim, 7),
  };
  return (
    <details class="shelf" open={!sizes.isNarrow}>
      <summary>Also there</summary>
      <div class="shelf-row">
        {others.map(([name, held]) =>
          matrix(held.index).rows * matrix(held.index).columns > 0 ? (
            <MatrixFigure key={name} slot={{ name }} {...parts} sizes={small} />
          ) : null,
        )}
      </div>
    </details>
  );
}
