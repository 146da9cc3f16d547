// Numbers that were read: from which bytes of which tensor.

import { matrix, recording, type Load, type Moment, type Store } from "../recording";
import { symbolOf } from "../names";

const TENSORS: Record<string, string[]> = { do: ["dout", "do"] };

export function loadOf(moment: Moment, name: string): Load | null {
  const names = TENSORS[name] ?? [name];
  return (
    moment.loads.find((each) => names.includes(each.tensor.toLowerCase())) ??
    (moment.loads.length === 1 ? moment.loads[0]! : null)
  );
}

const WIDTHS: Record<string, number> = { float16: 2, bfloat16: 2, float32: 4 };

/** "bytes 128 to 131 of K", or null where the row is not read or written. */
function bytesOf(place: Load | Store, row: number, column: number): string | null {
  const first = matrix(place.rows).data[row] ?? -1;
  if (first < 0) return null;
  const begin = first + column * place.column;
  const width = WIDTHS[recording.call.dtype] ?? 4;
  return `bytes ${begin} to ${begin + width - 1} of ${symbolOf(place.tensor)}`;
}

export function fromMemory(load: Load, row: number, column: number): string {
  const found = bytesOf(load, row, column);
  return found ? `Read from memory: ${found}.` : "Not read: beyond what there is, 0 stands in for it.";
}

export function toMemory(store: Store, row: number, column: number): string {
  const found = bytesOf(store, row, column);
  return found ? `Written to memory: ${found}.` : "Not written: beyond what there is.";
}
