// A chart of Observable Plot inside the page, redrawn when its data, the theme or the room change.

import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import * as Plot from "@observablehq/plot";
import { theme } from "../colour";
import { useWidth } from "../useWidth";

interface Props {
  label: string;
  options: Plot.PlotOptions;
  height?: number;
  right?: number; // room for what is written at the ends of lines
}

export function Chart({ label, options, height = 300, right = 84 }: Props): JSX.Element {
  const [box, width] = useWidth(640);
  const place = useRef<HTMLDivElement>(null);
  const shade = theme.value;
  useEffect(() => {
    const drawn = Plot.plot({
      width,
      height,
      marginLeft: 62,
      marginBottom: 40,
      marginTop: 30,
      marginRight: right,
      style: { background: "transparent", fontSize: "12px", fontFamily: "inherit", overflow: "visible" },
      ariaLabel: label,
      ...options,
    });
    drawn.setAttribute("role", "img"); // one picture with one name: those of its parts say "line", "rule"
    for (const part of drawn.querySelectorAll("[aria-label]")) part.removeAttribute("aria-label");
    place.current!.replaceChildren(drawn);
  }, [options, width, height, label, shade]);
  return (
    <div class="chart" ref={box}>
      <div ref={place} />
    </div>
  );
}
