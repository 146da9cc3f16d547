// The present moment in words: where in the walk, the statement, its equation, and what it means.

import type { JSX } from "preact";
import { useEffect } from "preact/hooks";
import { now as nowSignal, pass as passSignal, playing, spoken } from "./app_state";
import { idOf } from "./format";
import { recording, type Pass } from "./recording";
import { Statement } from "./Source";
import { stepsOf, type Beat } from "./walk";

/** "program 2, rows 16 to 31; step 1 of 3, a full tile". */
export function whereabouts(now: Beat, pass: Pass): string {
  const { program, stage } = now;
  const [first, stop] = program.owns;
  const what = program.walks === "rows" ? "keys" : "rows";
  const role = now.moment.role || undefined;
  const steps = stepsOf(program, role);
  const step = steps.findIndex(
    (each) => each === stage || (role && stage.tile && String(each.tile) === String(stage.tile)),
  );
  const head = typeof stage.head === "number" ? `, head ${stage.head}` : "";
  const split = program.split === null ? "" : `, split ${program.split}`;
  const who = `program ${idOf(program.id)}${split}, ${what} ${first} to ${stop - 1}`;
  if (stage.kind === "start") return `${who}; before the walk`;
  if (stage.kind === "end" && step < 0) return `${who}; after the walk`;
  const [row, column] = stage.tile ?? [0, 0];
  const [other, length, tile] =
    program.walks === "rows" ? [row, pass.lengths[0], pass.tile[0]] : [column, pass.lengths[1], pass.tile[1]];
  const seen = program.walks === "rows" ? "rows" : "keys";
  const range = stage.tile ? `, ${seen} ${other * tile} to ${Math.min((other + 1) * tile, length) - 1}` : "";
  const state = stage.state ? ` (${stage.state})` : "";
  return `${who}; step ${step + 1} of ${steps.length}${range}${head}${state}`;
}

export function Now(): JSX.Element {
  const now = nowSignal.value!;
  const pass = passSignal.value!;
  const { moment } = now;
  const note =
    moment.note ||
    Object.keys(moment.sets)
      .map((name) => recording.glossary[name]?.text)
      .filter(Boolean)[0] ||
    "";
  const place = whereabouts(now, pass);
  useEffect(() => {
    if (!playing.value) spoken.value = `${place}. ${moment.equation || moment.function}. ${note}`;
  }, [moment]);
  return (
    <section class="now" aria-label="This moment">
      <p class="whereabouts">
        {moment.role ? <span class="role">{moment.role}</span> : null}
        {place}
      </p>
      <p class="about">{pass.about}</p>
      <div class="meaning">
        {moment.equation && <p class="equation">{moment.equation}</p>}
        <p class="note">{note}</p>
      </div>
      <Statement />
    </section>
  );
}
