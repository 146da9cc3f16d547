// The head of the page: whose attention this is, how it was called, and how to read what follows.

import type { JSX } from "preact";
import { recording } from "./recording";

export function Header(): JSX.Element {
  const { call, made, title } = recording;
  const [, heads, rows, dim] = call.q;
  const keys = call.k[2];
  return (
    <header class="top">
      <div class="title">
        <p class="kicker">tilewise watch</p>
        <h1>{title}</h1>
        <p class="call">
          <code>{call.text}</code>
        </p>
        <p class="made">
          {rows} queries, {keys} keys, head_dim {dim}, {call.dtype}
          {heads !== 1 && `; head ${call.head + 1} of ${heads}`}. Recorded from the kernel itself,{" "}
          {Object.entries(made)
            .filter(([name]) => name !== "command")
            .map(([name, version]) => `${name} ${version}`)
            .join(", ")}
          {made.command ? (
            <>
              , by <code>{made.command}</code>
            </>
          ) : null}
          .
        </p>
        {Object.entries(recording.omitted).map(([what, why]) => (
          <p key={what} class="made">
            Not on this page: {what}, because {why}.
          </p>
        ))}
      </div>
      <HowTo />
    </header>
  );
}

const KEYS: [string, string][] = [
  ["Space", "play or pause"],
  ["← →", "one moment back or on"],
  ["Shift + ← →, Page Up / Down", "one tile back or on"],
  ["Home, End", "first, last moment"],
  ["Tab, then arrow keys", "inside a matrix: from number to number"],
  ["Enter", "on the map: go to the tile"],
];

function HowTo(): JSX.Element {
  const [rows, keys] = [recording.call.q[2] ?? 0, recording.call.k[2] ?? 0];
  return (
    <details class="how" open={innerWidth > 900}>
      <summary>How to read this</summary>
      <p>
        Attention compares every query with every key, and here that would be a matrix of {rows} × {keys}{" "}
        scores. The kernel never makes it: a program takes a few rows of Q, and walks over K and V a tile at a
        time. On each tile it computes the scores, turns them into weights, adds the weighted values to O, and
        forgets the scores. Two numbers a row are all it must remember: the largest score so far, and the sum
        of the weights so far, which are corrected whenever a larger score turns up. So the memory that it
        needs does not grow with the length of the text, and what fades on the map below is really gone.
      </p>
    </details>
  );
}

/** The keys of the page, for the bar of tabs. */
export function Keys(): JSX.Element {
  return (
    <details class="keys">
      <summary>Keys</summary>
      <dl>
        {KEYS.map(([key, does]) => (
          <div key={key}>
            <dt>{key}</dt>
            <dd>{does}</dd>
          </div>
        ))}
      </dl>
    </details>
  );
}
