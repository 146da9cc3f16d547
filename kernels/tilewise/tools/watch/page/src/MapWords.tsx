// The words along both sides of the map. Where rows are thin only some of them have room; the one pointed at is
// always written out.

import type { JSX } from "preact";
import { pass, picked } from "./app_state";
import type { Geometry } from "./map_geometry";
import { wordsOf } from "./recording";

const LINE = 11.5; // pixels that a word needs

function pointedAt(): { row: number; column: number } | null {
  const at = picked.value;
  return at?.of === "map" ? at : null;
}

export function MapWords({ geometry }: { geometry: Geometry }): JSX.Element {
  const { cell, line, rows, keys, x, y, label } = geometry;
  const at = pointedAt();
  const isWritten = (i: number, pointed: number | undefined, size: number): boolean => {
    const step = Math.max(1, Math.ceil(LINE / size));
    return i === pointed || (i % step === 0 && (pointed === undefined || Math.abs(i - pointed) >= step));
  };
  const cut = (word: string): string => {
    const most = Math.floor((label - 8) / 6.2);
    return word.length > most ? `${word.slice(0, most - 1)}…` : word;
  };
  const { queries, keys: keyWords } = wordsOf(pass.value);
  return (
    <g class="words" aria-hidden="true">
      {Array.from({ length: rows }, (_, i) => i)
        .filter((i) => isWritten(i, at?.row, line))
        .map((i) => (
          <text
            key={`r${i}`}
            class={i === at?.row ? "on" : ""}
            x={label - 6}
            y={y + (i + 0.5) * line}
            text-anchor="end"
            dominant-baseline="central"
          >
            <title>{queries[i]}</title>
            {cut(queries[i] ?? "")}
          </text>
        ))}
      {Array.from({ length: keys }, (_, j) => j)
        .filter((j) => isWritten(j, at?.column, cell))
        .map((j) => (
          <text
            key={`k${j}`}
            class={j === at?.column ? "on" : ""}
            transform={`translate(${x + (j + 0.5) * cell}, ${label - 6}) rotate(-90)`}
            dominant-baseline="central"
          >
            <title>{keyWords[j]}</title>
            {cut(keyWords[j] ?? "")}
          </text>
        ))}
    </g>
  );
}
