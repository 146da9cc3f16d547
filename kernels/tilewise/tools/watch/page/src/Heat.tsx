// A matrix as a heat map on a canvas, with a number in each cell where there is room.

import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { Cells } from "./Cells";
import { scaleFor, theme, type Scale, type Theme } from "./colour";
import { brief } from "./format";
import type { Kind } from "./names";
import { at, type Matrix } from "./recording";

export interface HeatProps {
  name: string; // of the variable, for tests and styles
  label: string; // for those who cannot see it
  values: Matrix;
  kind: Kind;
  high: number; // the end of its scale of colours
  width: number; // of a cell
  height: number;
  isTransposed?: boolean;
  valid?: [number, number]; // rows and columns that the text has; what lies beyond is drawn faintly
  onPick: (row: number, column: number, aloud: boolean) => void;
}

export function Heat(props: HeatProps): JSX.Element {
  const { values, isTransposed } = props;
  const [rows, columns] = isTransposed ? [values.columns, values.rows] : [values.rows, values.columns];
  return (
    <Cells
      label={props.label}
      rows={rows}
      columns={columns}
      width={props.width}
      height={props.height}
      onPick={(row, column, aloud) =>
        isTransposed ? props.onPick(column, row, aloud) : props.onPick(row, column, aloud)
      }
    >
      <Picture {...props} />
    </Cells>
  );
}

/** The canvas alone. */
export function Picture(props: Omit<HeatProps, "label" | "onPick">): JSX.Element {
  const { name, values, kind, high, width, height, isTransposed = false, valid } = props;
  const [validRows, validColumns] = valid ?? [values.rows, values.columns];
  const canvas = useRef<HTMLCanvasElement>(null);
  const shade = theme.value;
  const [rows, columns] = isTransposed ? [values.columns, values.rows] : [values.rows, values.columns];
  useEffect(() => {
    const isBeyond = (row: number, column: number): boolean => row >= validRows || column >= validColumns;
    draw(
      canvas.current!,
      { values, rows, columns, width, height, isTransposed, kind, high, isBeyond },
      shade,
    );
  }, [values, width, height, kind, high, isTransposed, shade, validRows, validColumns]);
  return <canvas ref={canvas} data-name={name} style={{ width: columns * width, height: rows * height }} />;
}

const BEYOND = 0.14;
const FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, monospace";

interface Drawing {
  values: Matrix;
  rows: number; // as it is drawn
  columns: number;
  width: number;
  height: number;
  isTransposed: boolean;
  kind: Kind;
  high: number;
  isBeyond: (row: number, column: number) => boolean; // of the matrix itself
}

function draw(canvas: HTMLCanvasElement, drawing: Drawing, shade: Theme): void {
  const { values, rows, columns, width, height, isTransposed, kind, high, isBeyond } = drawing;
  const sharp = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = Math.round(columns * width * sharp);
  canvas.height = Math.round(rows * height * sharp);
  const pen = canvas.getContext("2d")!;
  pen.scale(sharp, sharp);
  const scale = scaleFor(kind, high, shade);
  const size = Math.min(11, height - 4, width / 3.1);
  const characters = size >= 7.5 ? Math.floor((width - 2) / (size * 0.602)) : 0;
  pen.font = `${size}px ${FONT}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  // Lines between cells help where a cell is large; between small ones they would be all that is seen.
  const gap = width >= 9 && height >= 9 ? 0.5 : 0;
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const [i, j] = isTransposed ? [column, row] : [row, column];
      const x = at(values, i, j);
      pen.globalAlpha = isBeyond(i, j) ? BEYOND : 1;
      const [left, top] = [column * width, row * height];
      cell(pen, scale, x, left, top, width - gap, height - gap, shade);
      if (characters < 3 || kind === "bool" || x === -Infinity) continue;
      const text = brief(x, characters);
      if (text === "") continue;
      pen.fillStyle = scale.isDark(x) ? "#ffffff" : "#000000";
      pen.fillText(text, left + width / 2, top + height / 2 + 0.5);
    }
}

const INK: Record<Theme, { faint: string; line: string; yes: string }> = {
  light: { faint: "#edeae3", line: "#8d959e", yes: "#5d84ad" },
  dark: { faint: "#14181c", line: "#6d7681", yes: "#5f8bb8" },
};

/** One cell: its colour; -inf and "false" as a diagonal line on an empty ground, NaN as a cross. */
function cell(
  pen: CanvasRenderingContext2D,
  scale: Scale,
  x: number,
  left: number,
  top: number,
  width: number,
  height: number,
  shade: Theme,
): void {
  const ink = INK[shade];
  const isEmpty = Number.isNaN(x) || x === -Infinity || (scale.kind === "bool" && !x);
  pen.fillStyle = isEmpty ? ink.faint : scale.kind === "bool" ? ink.yes : scale.colour(x);
  pen.fillRect(left, top, width, height);
  if (!isEmpty || width < 3) return;
  pen.strokeStyle = ink.line;
  pen.lineWidth = Math.min(1, width / 8);
  pen.beginPath();
  pen.moveTo(left, top + height);
  pen.lineTo(left + width, top);
  if (Number.isNaN(x)) {
    pen.moveTo(left, top);
    pen.lineTo(left + width, top + height);
  }
  pen.stroke();
}
