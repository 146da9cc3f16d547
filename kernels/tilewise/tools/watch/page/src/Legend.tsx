// The scale of colours of a heat map, with its ends.

import type { JSX } from "preact";
import { scaleFor, theme } from "./colour";
import { short } from "./format";
import type { Kind } from "./names";

export function Legend({ kind, high, text }: { kind: Kind; high: number; text: string }): JSX.Element {
  const scale = scaleFor(kind, high, theme.value);
  const steps = 24;
  const places = Array.from({ length: steps + 1 }, (_, i) =>
    kind === "signed" ? scale.low + ((scale.high - scale.low) * i) / steps : scale.high * (i / steps) ** 2,
  );
  return (
    <span class="legend">
      <span class="legend-text">{text}</span>
      <span>{short(scale.low)}</span>
      <span
        class="ramp"
        style={{ background: `linear-gradient(to right, ${places.map(scale.colour).join(", ")})` }}
        aria-hidden="true"
      />
      <span>{short(scale.high)}</span>
    </span>
  );
}
