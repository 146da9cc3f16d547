// The map: the matrix of scores as the tiles that it is never stored as, with what is read and built around it.

import type { JSX } from "preact";
import { Cells } from "./Cells";
import { crop } from "./crop";
import { goToTile, keepSeen, now as nowSignal, pass as passSignal, pick, picked } from "./app_state";
import { Picture } from "./Heat";
import { geometryOf, type Geometry } from "./map_geometry";
import { boxOf, countTiles, fillOf, Patterns, Tiles, Walk } from "./MapTiles";
import { Growing, Whole } from "./MapSides";
import { Programs } from "./MapPrograms";
import { MapWords } from "./MapWords";
import { kindOf } from "./names";
import { matrix, type Pass, type Stage } from "./recording";
import { tileValues } from "./tile_values";
import { useWidth } from "./useWidth";
import { beatsOf, largestOf, type Beat } from "./walk";

export function ScoreMap(): JSX.Element {
  const pass = passSignal.value!;
  const now = nowSignal.value!;
  const [box, room] = useWidth(560);
  const geometry = geometryOf(pass, room);
  const { x, y, cell, line, rows, keys, width, height } = geometry;
  const tiles = countTiles(pass.grid);
  return (
    <section class="figure map" aria-labelledby="map-title">
      <div class="figure-head">
        <h2 id="map-title">The map</h2>
        <p>
          {rows} × {keys} scores in tiles of {pass.tile[0]} × {pass.tile[1]}. Only the tile of this moment
          exists.
        </p>
      </div>
      <div class="scroller" ref={box}>
        <div class="stage" style={{ width, height }}>
          <svg class="ground" width={width} height={height} role="img" aria-label={describe(tiles, pass)}>
            <Patterns id="map" />
            <MapWords geometry={geometry} />
            <g transform={`translate(${x}, ${y})`}>
              <Tiles pass={pass} geometry={geometry} id="map" />
            </g>
          </svg>
          {geometry.left.map((strip) => (
            <Whole key={strip.name} strip={strip} side="left" geometry={geometry} />
          ))}
          {geometry.top.map((strip) => (
            <Whole key={strip.name} strip={strip} side="top" geometry={geometry} />
          ))}
          {geometry.right.map((strip) => (
            <Growing key={strip.name} strip={strip} side="right" geometry={geometry} />
          ))}
          {geometry.bottom.map((strip) => (
            <Growing key={strip.name} strip={strip} side="bottom" geometry={geometry} />
          ))}
          {pass.grid.length > 0 && (
            <div class="scores" style={{ left: x, top: y }}>
              <Cells
                label="The matrix of scores"
                rows={rows}
                columns={keys}
                width={cell}
                height={line}
                onPick={(row, column, aloud) => pick({ of: "map", row, column }, aloud)}
                onChoose={(row, column) =>
                  goToTile(Math.floor(row / pass.tile[0]), Math.floor(column / pass.tile[1]))
                }
              >
                {shownTiles(pass, now).map((each) => (
                  <TileOnMap key={each.name} {...each} pass={pass} geometry={geometry} />
                ))}
              </Cells>
            </div>
          )}
          <Marks pass={pass} now={now} geometry={geometry} />
          <Programs pass={pass} now={now} geometry={geometry} />
        </div>
      </div>
      <Key />
    </section>
  );
}

function describe(tiles: ReturnType<typeof countTiles>, pass: Pass): string {
  const [down, across] = [pass.grid.length, pass.grid[0]?.length ?? 0];
  return `${down} by ${across} tiles: ${tiles.full} full, ${tiles.cut} cut by the mask, ${tiles.skipped} skipped.`;
}

interface OnMap {
  name: string; // which step of which program: a step that comes back fades anew
  stage: Stage;
  upTo: number;
  isLeaving: boolean;
}

/** The tile of this moment, the one that is fading, and with "keep" all that have been. */
function shownTiles(pass: Pass, now: Beat): OnMap[] {
  const found: OnMap[] = [];
  const beats = beatsOf(pass);
  const named = (beat: Beat): string => `${beat.programAt} ${beat.stageAt}`;
  if (keepSeen.value) {
    for (const beat of beats) {
      if (beat.position >= now.position) break;
      const isLast = beats[beat.position + 1]?.stage !== beat.stage;
      if (beat.stage.tile && isLast)
        found.push({ name: named(beat), stage: beat.stage, upTo: beat.momentAt, isLeaving: false });
    }
  } else {
    let i = now.position;
    while (i >= 0 && (beats[i]!.stage === now.stage || !beats[i]!.stage.tile)) i--;
    const before = beats[i];
    if (before)
      found.push({ name: named(before), stage: before.stage, upTo: before.momentAt, isLeaving: true });
  }
  if (now.stage.tile)
    found.push({ name: named(now), stage: now.stage, upTo: now.momentAt, isLeaving: false });
  return found;
}

function TileOnMap({
  stage,
  upTo,
  isLeaving,
  pass,
  geometry,
}: OnMap & { pass: Pass; geometry: Geometry }): JSX.Element | null {
  const shown = tileValues(stage, upTo);
  if (!shown) return null;
  const box = boxOf(pass, geometry, ...stage.tile!);
  const values = matrix(shown.index);
  const isTransposed = shown.name.endsWith("T");
  const [rows, keys] = [Math.round(box.height / geometry.line), Math.round(box.width / geometry.cell)];
  const kind = kindOf(shown.name, values.type);
  if (rows === 0 || keys === 0) return null;
  return (
    <div class={isLeaving ? "on-map leaving" : "on-map"} style={{ left: box.left, top: box.top }}>
      <Picture
        name={`map-${shown.name}`}
        values={isTransposed ? crop(values, keys, rows) : crop(values, rows, keys)}
        kind={kind}
        high={kind === "weight" ? 1 : largestOf(pass, shown.name)}
        width={geometry.cell}
        height={geometry.line}
        isTransposed={isTransposed}
      />
    </div>
  );
}

/** What lies over the numbers: the owned band, the tile of this moment, the walk. */
function Marks({ pass, now, geometry }: { pass: Pass; now: Beat; geometry: Geometry }): JSX.Element {
  const { x, y, cell, line, width, height, rows, keys } = geometry;
  const [first, stop] = now.program.owns;
  const byRows = now.program.walks !== "rows";
  const tile = now.stage.tile ? boxOf(pass, geometry, ...now.stage.tile) : null;
  const farX = (geometry.right.at(-1)?.at ?? x + keys * cell) + (geometry.right.at(-1)?.size ?? 0);
  const farY = (geometry.bottom.at(-1)?.at ?? y + rows * line) + (geometry.bottom.at(-1)?.size ?? 0);
  const nearX = geometry.left[0]?.at ?? x;
  const nearY = geometry.top[0]?.at ?? y;
  const at = picked.value?.of === "map" ? picked.value : null;
  return (
    <svg class="marks" width={width} height={height} aria-hidden="true">
      {byRows ? (
        <rect
          class="owned"
          x={nearX - 2}
          y={y + first * line}
          width={farX - nearX + 4}
          height={(stop - first) * line}
          rx="3"
        />
      ) : (
        <rect
          class="owned"
          x={x + first * cell}
          y={nearY - 2}
          width={(stop - first) * cell}
          height={farY - nearY + 4}
          rx="3"
        />
      )}
      {tile && byRows && geometry.top.length > 0 && (
        <rect
          class="read"
          x={x + tile.left}
          y={nearY - 2}
          width={tile.width}
          height={geometry.top.at(-1)!.at + geometry.top.at(-1)!.size - nearY + 4}
          rx="3"
        />
      )}
      {tile && !byRows && geometry.left.length > 0 && (
        <rect class="read" x={nearX - 2} y={y + tile.top} width={x - nearX - 4} height={tile.height} rx="3" />
      )}
      <g transform={`translate(${x}, ${y})`}>
        <Walk
          pass={pass}
          geometry={geometry}
          program={now.program}
          role={now.moment.role}
          here={now.stage.tile}
          id="map"
        />
        {tile && (
          <rect class="here" x={tile.left} y={tile.top} width={tile.width} height={tile.height} rx="3" />
        )}
        {at && (
          <>
            <rect class="cross" x={0} y={at.row * line} width={keys * cell} height={line} />
            <rect class="cross" x={at.column * cell} y={0} width={cell} height={rows * line} />
          </>
        )}
      </g>
    </svg>
  );
}

function Key(): JSX.Element {
  const entries: [string, string][] = [
    ["#", "full: every pair counts"],
    ["%", "cut: the mask takes some"],
    [".", "skipped: never visited"],
  ];
  return (
    <ul class="key" aria-label="Kinds of tiles">
      {entries.map(([sign, text]) => (
        <li key={sign}>
          <svg width="18" height="18" aria-hidden="true">
            <Patterns id={`key${sign.charCodeAt(0)}`} />
            <rect {...fillOf(sign, `key${sign.charCodeAt(0)}`)} x="1" y="1" width="16" height="16" rx="2" />
          </svg>
          {text}
        </li>
      ))}
      <li>
        <label class="switch">
          <input
            type="checkbox"
            checked={keepSeen.value}
            onChange={(event) => (keepSeen.value = event.currentTarget.checked)}
          />
          keep what has been seen
        </label>
      </li>
    </ul>
  );
}
