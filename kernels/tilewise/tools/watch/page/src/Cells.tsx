// A field of cells that can be pointed at with a mouse, a finger or the arrow keys.

import type { ComponentChildren, JSX } from "preact";
import { useRef, useState } from "preact/hooks";

interface Props {
  label: string;
  rows: number;
  columns: number;
  width: number; // of a cell, in pixels
  height: number;
  onPick: (row: number, column: number, aloud: boolean) => void;
  onChoose?: (row: number, column: number) => void; // click, tap or Enter
  class?: string;
  children: ComponentChildren;
}

const MOVES: Record<string, [number, number]> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};

export function Cells(props: Props): JSX.Element {
  const { rows, columns, width, height } = props;
  const [cursor, setCursor] = useState<[number, number]>([0, 0]);
  const [isFocused, setFocused] = useState(false);
  const field = useRef<HTMLDivElement>(null);

  const cellAt = (event: PointerEvent | MouseEvent): [number, number] | null => {
    const box = field.current!.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / height);
    const column = Math.floor((event.clientX - box.left) / width);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  };
  const point = (event: PointerEvent): void => {
    const cell = cellAt(event);
    if (!cell) return;
    setCursor(cell);
    props.onPick(cell[0], cell[1], false);
  };
  const press = (event: KeyboardEvent): void => {
    if (event.key === "Enter" && props.onChoose) {
      props.onChoose(...cursor);
      event.preventDefault();
      return;
    }
    const move = MOVES[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation(); // the arrows move here, not through the moments
    const next: [number, number] = [
      Math.max(0, Math.min(rows - 1, cursor[0] + move[0])),
      Math.max(0, Math.min(columns - 1, cursor[1] + move[1])),
    ];
    setCursor(next);
    props.onPick(next[0], next[1], true);
  };
  const [row, column] = [Math.min(cursor[0], rows - 1), Math.min(cursor[1], columns - 1)];
  return (
    <div
      ref={field}
      class={`cells ${props.class ?? ""}`}
      role="application"
      aria-roledescription="field of numbers"
      aria-label={`${props.label}: ${rows} by ${columns}; arrow keys move`}
      tabIndex={0}
      style={{ width: columns * width, height: rows * height }}
      onPointerMove={(event) => event.pointerType === "mouse" && point(event)}
      onPointerDown={point}
      onClick={(event) => {
        const cell = cellAt(event);
        if (cell && props.onChoose) props.onChoose(...cell);
      }}
      onKeyDown={press}
      onFocus={(event) => {
        setFocused(true);
        if (event.currentTarget.matches(":focus-visible")) props.onPick(row, column, true);
      }}
      onBlur={() => setFocused(false)}
    >
      {props.children}
      {isFocused && (
        <div
          class="cursor"
          style={{ left: column * width, top: row * height, width, height }}
          aria-hidden="true"
        />
      )}
    </div>
  );
}
