// Hopper: who works when. Lanes of roles and of units on one axis of clocks, from a model of the machine.

import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { scaleLinear } from "d3-scale";
import { now as nowSignal, pass as passSignal } from "./app_state";
import type { Span, Timeline } from "./recording";
import { useWidth } from "./useWidth";
import { beatsOf, stepsOf, type Beat } from "./walk";

const LANE = 34;
const NAME = 112;
const AXIS = 26;

function isSameRole(a: Beat, b: Beat): boolean {
  return a.program === b.program && a.moment.role === b.moment.role;
}

/** Which step of its role a moment belongs to; -1 outside of them. */
function stepOf(beat: Beat): number {
  return stepsOf(beat.program, beat.moment.role).findIndex(
    (each) => each === beat.stage || (each.tile !== null && String(each.tile) === String(beat.stage.tile)),
  );
}

/** The clock of a moment: as far between the beginnings of two steps as the moment is into its step. */
export function clockOf(timeline: Timeline, now: Beat): number {
  if (now.stage.kind === "start") return 0;
  const step = stepOf(now);
  const lane = timeline.lanes.find((each) => each.name === now.moment.role);
  const beginOf = (which: number): number =>
    Math.min(...(lane?.spans ?? []).filter((each) => each.step === which).map((each) => each.begin));
  const begin = beginOf(step);
  if (begin === Infinity) return timeline.clocks;
  const end = Math.min(beginOf(step + 1), timeline.clocks);
  const mine = beatsOf(passSignal.value!).filter((beat) => isSameRole(beat, now) && stepOf(beat) === step);
  return begin + (end - begin) * ((mine.indexOf(now) + 0.5) / mine.length);
}

export function TimelineFigure({ timeline }: { timeline: Timeline }): JSX.Element {
  const now = nowSignal.value!;
  const [box, room] = useWidth(900);
  const width = Math.max(room - NAME, 640);
  const x = scaleLinear()
    .domain([0, timeline.clocks])
    .range([6, width - 12]);
  const height = timeline.lanes.length * LANE + AXIS;
  const clock = clockOf(timeline, now);
  const current = stepOf(now);
  useEffect(() => {
    const view = box.current!;
    const left = x(clock);
    if (left < view.scrollLeft || left > view.scrollLeft + view.clientWidth - NAME - 20)
      view.scrollLeft = left - (view.clientWidth - NAME) / 2;
  }, [clock, width]);
  const firstUnit = timeline.lanes.findIndex((lane) => lane.unit);
  const tip = useRef<HTMLParagraphElement>(null);
  const say = (lane: string, span: Span): void => {
    tip.current!.textContent = `${lane}: ${span.name}, step ${span.step + 1}, clocks ${Math.round(span.begin)} to ${Math.round(span.end)}`;
  };
  return (
    <section class="figure timeline" aria-labelledby="timeline-title">
      <div class="figure-head">
        <h2 id="timeline-title">Who works when</h2>
        <p>
          <strong>A model, not measured.</strong> {timeline.about}
        </p>
      </div>
      <div class="scroller" ref={box} tabIndex={0} role="region" aria-label="Lanes of roles and units">
        <ul class="lane-names" style={{ width: NAME }}>
          {timeline.lanes.map((lane) => (
            <li key={lane.name} class={lane.name === now.moment.role ? "on" : ""} style={{ height: LANE }}>
              {lane.name}
            </li>
          ))}
          <li style={{ height: AXIS }}>clocks</li>
        </ul>
        <svg
          width={width}
          height={height}
          role="img"
          aria-label={`${timeline.lanes.length} lanes over ${Math.round(timeline.clocks)} clocks`}
        >
          {timeline.lanes.map((lane, i) => (
            <g
              key={lane.name}
              transform={`translate(0, ${i * LANE})`}
              class={lane.unit ? "lane unit" : "lane"}
            >
              <line x1="0" x2={width} y1="0" y2="0" class={i === firstUnit ? "border" : ""} />
              {lane.spans.map((span, j) => (
                <g
                  key={j}
                  class={span.step === current ? "span on" : "span"}
                  onPointerEnter={() => say(lane.name, span)}
                >
                  <rect
                    x={x(span.begin)}
                    y="5"
                    width={Math.max(1, x(span.end) - x(span.begin) - 1)}
                    height={LANE - 10}
                    rx="2"
                  >
                    <title>{`${span.name}, step ${span.step + 1}: clocks ${Math.round(span.begin)} to ${Math.round(span.end)}`}</title>
                  </rect>
                  {x(span.end) - x(span.begin) > span.name.length * 6.4 + 6 && (
                    <text
                      x={(x(span.begin) + x(span.end)) / 2}
                      y={LANE / 2}
                      text-anchor="middle"
                      dominant-baseline="central"
                    >
                      {span.name}
                    </text>
                  )}
                </g>
              ))}
            </g>
          ))}
          <g class="axis" transform={`translate(0, ${timeline.lanes.length * LANE})`}>
            <line x1="0" x2={width} y1="0" y2="0" />
            {x.ticks(8).map((tick) => (
              <text key={tick} x={x(tick)} y="17" text-anchor="middle">
                {tick}
              </text>
            ))}
          </g>
          <line class="clock" x1={x(clock)} x2={x(clock)} y1="0" y2={height - AXIS} />
        </svg>
      </div>
      <p class="tip" ref={tip}>
        Spans of the step of this moment are drawn strong. Point at one for its clocks.
      </p>
    </section>
  );
}
