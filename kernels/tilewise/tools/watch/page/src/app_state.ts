// What the reader has chosen: the tab, the moment of each pass, whether it plays, and the number looked at.

import { computed, signal, type Signal } from "@preact/signals";
import { recording, type Index, type Pass, type PassName } from "./recording";
import { beatsOf, stageFrom, type Beat } from "./walk";

export type Tab = PassName | "compare";

export const tabs: Tab[] = [...recording.passes.map((pass) => pass.name), "compare"];
export const tab = signal<Tab>(tabs[0]!);
export const playing = signal(false);
export const speed = signal(2); // moments a second
export const keepSeen = signal(false);
export const zoom = signal(1);
export const spoken = signal(""); // what a screen reader is told

const positions = new Map<PassName, Signal<number>>(recording.passes.map((pass) => [pass.name, signal(0)]));

export const pass = computed<Pass | null>(
  () => recording.passes.find((each) => each.name === tab.value) ?? null,
);
export const position = computed<number>(() => (pass.value ? positions.get(pass.value.name)!.value : 0));
export const now = computed<Beat | null>(() =>
  pass.value ? (beatsOf(pass.value)[position.value] ?? null) : null,
);

export function goTo(place: number): void {
  const at = pass.value;
  if (!at) return;
  const last = beatsOf(at).length - 1;
  positions.get(at.name)!.value = Math.max(0, Math.min(last, place));
}

export function goBy(moments: number): void {
  goTo(position.value + moments);
}

export function goToStage(step: 1 | -1): void {
  if (pass.value) goTo(stageFrom(beatsOf(pass.value), position.value, step));
}

export function goToProgram(programAt: number): void {
  if (!pass.value) return;
  const found = beatsOf(pass.value).find((beat) => beat.programAt === programAt);
  if (found) goTo(found.position);
}

/** The first moment at which some program stands on a tile, of this program if it ever does. */
export function goToTile(row: number, column: number): boolean {
  if (!pass.value) return false;
  const beats = beatsOf(pass.value).filter(
    (beat) => beat.stage.tile?.[0] === row && beat.stage.tile[1] === column,
  );
  const mine = beats.find((beat) => beat.program === now.value?.program) ?? beats[0];
  if (mine) goTo(mine.position);
  return mine !== undefined;
}

export function open(name: Tab): void {
  playing.value = false;
  picked.value = null;
  tab.value = name;
}

/** A number that the reader points at. Of a variable it is followed from moment to moment. */
export type Picked =
  | { of: "variable"; name: string; row: number; column: number }
  | { of: "tensor"; name: string; row: number; column: number }
  | { of: "map"; row: number; column: number }
  | { of: "weights"; name: string; index: Index; row: number; column: number };

export const picked = signal<Picked | null>(null);

/** Point at a number; `aloud` where the reader came by keyboard and must be told. */
export function pick(next: Picked, aloud = false): void {
  picked.value = next;
  pickedAloud.value = aloud;
}

export const pickedAloud = signal(false);
