// The kernel's real source, the statement of this moment marked.

import type { JSX } from "preact";
import { memo } from "preact/compat";
import { useEffect, useRef } from "preact/hooks";
import { now as nowSignal, pass as passSignal } from "./app_state";
import { recording } from "./recording";

export function Source(): JSX.Element {
  const { moment } = nowSignal.value!;
  const pass = passSignal.value!;
  const scroll = useRef<HTMLPreElement>(null);
  const [first, last] = moment.lines;
  useEffect(() => {
    const box = scroll.current!;
    const line = box.querySelector<HTMLElement>(`[data-line="${first}"]`);
    if (!line) return;
    const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const top = line.offsetTop - box.clientHeight / 2 + ((last - first + 1) * line.offsetHeight) / 2;
    box.scrollTo({ top, behavior: isStill ? "instant" : "smooth" });
  }, [moment]);
  return (
    <section class="figure source" aria-labelledby="source-title">
      <div class="figure-head">
        <h2 id="source-title">The source</h2>
        <p>
          {moment.depth > 0 && <>{pass.kernel} calls </>}
          <code>{moment.function}</code> in <code>{moment.file}</code>
        </p>
      </div>
      <pre ref={scroll} tabIndex={0} aria-label={`Source of ${moment.file}`}>
        {(recording.sources[moment.file] ?? []).map((tokens, i) => (
          <Line key={i} number={i + 1} tokens={tokens} isOn={i + 1 >= first && i + 1 <= last} />
        ))}
      </pre>
    </section>
  );
}

interface LineProps {
  number: number;
  tokens: [string, string][];
  isOn: boolean;
}

const Line = memo(({ number, tokens, isOn }: LineProps) => (
  <code class={isOn ? "line on" : "line"} data-line={number}>
    <span class="number" aria-hidden="true">
      {number}
    </span>
    <span>
      {tokens.map(([kind, text], i) =>
        kind ? (
          <span key={i} class={`t-${kind}`}>
            {text}
          </span>
        ) : (
          text
        ),
      )}
      {"\n"}
    </span>
  </code>
));

/** The statement of this moment alone, without its indent. */
export function Statement(): JSX.Element {
  const { moment } = nowSignal.value!;
  const [first, last] = moment.lines;
  const lines = (recording.sources[moment.file] ?? []).slice(first - 1, last);
  const texts = lines.map((tokens) => tokens.map((each) => each[1]).join(""));
  const indent = Math.min(
    ...texts.filter((each) => each.trim()).map((each) => each.length - each.trimStart().length),
  );
  return (
    <pre class="statement" tabIndex={0} aria-label="The statement">
      {texts.map((each) => each.slice(indent)).join("\n")}
    </pre>
  );
}
