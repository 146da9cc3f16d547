// A part of a matrix: tiles reach beyond the end of the text. The same part is the same object, so that it is
// drawn once.

import type { Matrix } from "./recording";

const cropped = new WeakMap<Matrix, Map<string, Matrix>>();

export function crop(x: Matrix, rows: number, columns = x.columns): Matrix {
  const [height, width] = [Math.min(rows, x.rows), Math.min(columns, x.columns)];
  if (height === x.rows && width === x.columns) return x;
  const known = cropped.get(x) ?? new Map<string, Matrix>();
  cropped.set(x, known);
  const key = `${height} ${width}`;
  const found = known.get(key) ?? part(x, height, width);
  known.set(key, found);
  return found;
}

function part(x: Matrix, rows: number, columns: number): Matrix {
  const data = new Float32Array(rows * columns);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) data[i * columns + j] = x.data[i * x.columns + j]!;
  return { ...x, rows, columns, data, shape: [rows, columns] };
}
