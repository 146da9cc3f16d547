// The tab that compares: one idea a section.

import type { JSX } from "preact";
import { recording } from "../recording";
import { Bytes } from "./Bytes";
import { Masks } from "./Masks";
import { Online } from "./Online";
import { Rounding } from "./Rounding";
import { Similarities } from "./Similarities";

export function Compare(): JSX.Element {
  const { compare, passes } = recording;
  return (
    <div class="compare">
      {passes.some((pass) => pass.name === "forward") && <Online />}
      <Bytes />
      {compare.rounding.length > 0 && <Rounding />}
      {compare.mask.length > 0 && <Masks />}
      {compare.similarity.length > 0 && <Similarities />}
    </div>
  );
}
