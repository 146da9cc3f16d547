// A button for each program, beside what it owns.

import type { JSX } from "preact";
import { goToProgram } from "./app_state";
import { idOf } from "./format";
import type { Geometry } from "./map_geometry";
import { wordsOf, type Pass } from "./recording";
import type { Beat } from "./walk";

const LEAST = 24; // pixels that a finger needs

export function Programs({
  pass,
  now,
  geometry,
}: {
  pass: Pass;
  now: Beat;
  geometry: Geometry;
}): JSX.Element {
  const { x, y, cell, line, gutter, button } = geometry;
  return (
    <div class="programs">
      {pass.programs.map((program, i) => {
        const [first, stop] = program.owns;
        const beside = pass.programs.filter((each) => each.owns[0] === first).indexOf(program);
        const byRows = program.walks !== "rows";
        const words = byRows ? wordsOf(pass).queries : wordsOf(pass).keys;
        const range = `${byRows ? "rows" : "keys"} ${first} to ${stop - 1}`;
        const name = `Program ${idOf(program.id)}: ${range}, “${words[first] ?? ""}” to “${words[stop - 1] ?? ""}”`;
        const across = gutter + beside * button;
        return (
          <button
            key={i}
            type="button"
            class="program"
            aria-pressed={program === now.program}
            aria-label={name}
            title={name}
            style={
              byRows
                ? {
                    left: across,
                    top: y + first * line + 1,
                    height: Math.max(LEAST, (stop - first) * line - 2),
                    width: button - 2,
                  }
                : {
                    left: x + first * cell + 1,
                    top: across,
                    width: Math.max(LEAST, (stop - first) * cell - 2),
                    height: button - 2,
                  }
            }
            onClick={() => goToProgram(i)}
          >
            {idOf(program.id).replace(" ", "")}
          </button>
        );
      })}
    </div>
  );
}
