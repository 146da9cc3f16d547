import type { ComponentChildren, JSX } from "preact";

/** Chooses one of the rows, by its word; children: choices that come before them. */
export function RowChoice(props: {
  row: number;
  words: string[];
  choose: (row: number) => void;
  children?: ComponentChildren;
}): JSX.Element {
  return (
    <label class="choice">
      <span>Row</span>
      <select
        aria-label="Row"
        value={String(props.row)}
        onChange={(event) => props.choose(Number(event.currentTarget.value))}
      >
        {props.children}
        {props.words.map((word, i) => (
          <option key={i} value={String(i)}>
            {i}: {word}
          </option>
        ))}
      </select>
    </label>
  );
}
