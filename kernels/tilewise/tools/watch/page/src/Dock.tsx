// What stays at the foot of the window: the number pointed at, told, and the controls of the walk.

import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { now, pass, picked, pickedAloud, position, spoken } from "./app_state";
import { exact } from "./format";
import { at, matrix, recording, tensor, type Index, type Matrix } from "./recording";
import { told } from "./resolve";
import { Transport } from "./Transport";
import { stateAt } from "./walk";

export function Dock(): JSX.Element {
  return (
    <footer class="dock" aria-label="Number and controls">
      <Inspector />
      {pass.value && <Transport />}
    </footer>
  );
}

function Inspector(): JSX.Element {
  const target = picked.value;
  const found = target && (target.of === "weights" || now.value) ? told(target) : null;
  const [isTable, setTable] = useState(false);
  useEffect(() => {
    if (found && pickedAloud.value)
      spoken.value = `${found.name}, ${found.words}: ${found.value}. ${found.origin.join(" ")}`;
  }, [found?.name, found?.value]);
  const values = target && valuesOf();
  return (
    <section class="inspector" aria-label="The number pointed at">
      {found ? (
        <>
          <div class="what">
            <span class="name">{found.name}</span>
            <span class="of">{found.words}</span>
          </div>
          <div class="value-of">
            <span class="value" title="as recorded, nine significant digits">
              {found.value || "none"}
            </span>
            <span class="of" title={found.meaning}>
              {found.meaning}
            </span>
          </div>
          <div class="origin" tabIndex={0} role="region" aria-label="Where it came from">
            {found.origin.map((line) => (
              <p key={line}>{line}</p>
            ))}
          </div>
          {values && (
            <button type="button" class="quiet" aria-expanded={isTable} onClick={() => setTable(!isTable)}>
              {isTable ? "Close the table" : "As a table"}
            </button>
          )}
          {isTable && values && <Table values={values} />}
        </>
      ) : (
        <p class="hint">Point at any number or tap it: here stands what it is, and where it came from.</p>
      )}
    </section>
  );
}

/** The matrix that the number is one of. */
function valuesOf(): Matrix | null {
  const target = picked.value!;
  if (target.of === "tensor") return tensor(target.name, pass.value);
  if (target.of === "weights") return matrix(target.index);
  if (target.of !== "variable" || !pass.value) return null;
  const index: Index | undefined = stateAt(pass.value, position.value).get(target.name)?.index;
  return index === undefined ? null : matrix(index);
}

function Table({ values }: { values: Matrix }): JSX.Element {
  const title = recording.title;
  return (
    <div class="table" tabIndex={0} role="region" aria-label={`All its numbers, of ${title}`}>
      <table>
        <thead>
          <tr>
            <th scope="col">row</th>
            {Array.from({ length: values.columns }, (_, j) => (
              <th key={j} scope="col">
                {j}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {Array.from({ length: values.rows }, (_, i) => (
            <tr key={i}>
              <th scope="row">{i}</th>
              {Array.from({ length: values.columns }, (_, j) => (
                <td key={j}>{exact(at(values, i, j), values.type)}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
