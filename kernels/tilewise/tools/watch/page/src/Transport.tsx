// The controls of the walk: moments, tiles, programs, a slider over all of them, and their speed.

import type { JSX } from "preact";
import { useEffect } from "preact/hooks";
import { goBy, goTo, goToProgram, goToStage, now, pass, playing, position, speed } from "./app_state";
import { idOf } from "./format";
import { whereabouts } from "./Now";
import { beatsOf } from "./walk";

function toggle(): void {
  const last = beatsOf(pass.value!).length - 1;
  if (!playing.value && position.value >= last) goTo(0);
  playing.value = !playing.value;
}

/** Keys that work wherever the reader is, but not where he writes or chooses. */
function press(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (event.altKey || event.ctrlKey || event.metaKey || !pass.value) return;
  if (target.closest("input, select, textarea, [role=tab]")) return;
  const isButton = target.closest("button, summary, a") !== null;
  const act: Record<string, () => void> = {
    " ": () => toggle(),
    ArrowRight: () => (event.shiftKey ? goToStage(1) : goBy(1)),
    ArrowLeft: () => (event.shiftKey ? goToStage(-1) : goBy(-1)),
    PageDown: () => goToStage(1),
    PageUp: () => goToStage(-1),
    Home: () => goTo(0),
    End: () => goTo(beatsOf(pass.value!).length - 1),
  };
  const found = act[event.key];
  if (!found || (event.key === " " && isButton)) return;
  event.preventDefault();
  if (event.key !== " ") playing.value = false;
  found();
}

export function Transport(): JSX.Element {
  const at = pass.value!;
  const last = beatsOf(at).length - 1;
  useEffect(() => {
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  }, []);
  useEffect(() => {
    if (!playing.value) return;
    const timer = setInterval(() => {
      if (position.value >= last) playing.value = false;
      else goBy(1);
    }, 1000 / speed.value);
    return () => clearInterval(timer);
  }, [playing.value, speed.value, at]);
  const stop = (act: () => void) => (): void => {
    playing.value = false;
    act();
  };
  return (
    <div class="transport" role="group" aria-label="Walk through the moments">
      <div class="buttons">
        <Button name="First moment" icon="M4 4v12M16 4 7 10l9 6z" act={stop(() => goTo(0))} />
        <Button name="Previous tile" icon="M10 4 3 10l7 6zM17 4l-7 6 7 6z" act={stop(() => goToStage(-1))} />
        <Button name="Previous moment" icon="M14 4 5 10l9 6z" act={stop(() => goBy(-1))} />
        <Button
          name={playing.value ? "Pause" : "Play"}
          icon={playing.value ? "M5 4h3.5v12H5zM11.5 4H15v12h-3.5z" : "M5 3l12 7-12 7z"}
          act={toggle}
          isMain
        />
        <Button name="Next moment" icon="M6 4l9 6-9 6z" act={stop(() => goBy(1))} />
        <Button name="Next tile" icon="M3 4l7 6-7 6zM10 4l7 6-7 6z" act={stop(() => goToStage(1))} />
        <Button name="Last moment" icon="M16 4v12M4 4l9 6-9 6z" act={stop(() => goTo(last))} />
      </div>
      <input
        class="slider"
        type="range"
        min="0"
        max={last}
        value={position.value}
        aria-label="Moment"
        aria-valuetext={`moment ${position.value + 1} of ${last + 1}: ${whereabouts(now.value!, at)}`}
        onInput={(event) => {
          playing.value = false;
          goTo(Number(event.currentTarget.value));
        }}
      />
      <output class="count">
        {position.value + 1} / {last + 1}
      </output>
      <label class="choice program-choice">
        <span aria-hidden="true">Program</span>
        <select
          aria-label="Program"
          value={String(now.value!.programAt)}
          onChange={(event) => goToProgram(Number(event.currentTarget.value))}
        >
          {at.programs.map((program, i) => (
            <option key={i} value={String(i)}>
              {idOf(program.id)}
            </option>
          ))}
        </select>
      </label>
      <label class="choice speed-choice">
        <span aria-hidden="true">Speed</span>
        <select
          aria-label="Speed"
          value={String(speed.value)}
          onChange={(event) => (speed.value = Number(event.currentTarget.value))}
        >
          {[0.5, 1, 2, 4, 8, 16].map((each) => (
            <option key={each} value={String(each)}>
              {each} / s
            </option>
          ))}
        </select>
      </label>
    </div>
  );
}

function Button(props: { name: string; icon: string; act: () => void; isMain?: boolean }): JSX.Element {
  return (
    <button
      type="button"
      class={props.isMain ? "main" : ""}
      aria-label={props.name}
      title={props.name}
      onClick={props.act}
    >
      <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
        <path d={props.icon} />
      </svg>
    </button>
  );
}
