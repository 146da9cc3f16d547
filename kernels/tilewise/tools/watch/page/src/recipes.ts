// How the matrices of a step are laid out: as on paper, a product has its left factor at its left and its right
// factor above it. A block is three columns wide; text in a free corner is the equation of what stands there.

import type { PassName } from "./recording";

export interface Slot {
  name: string;
  isTransposed?: boolean;
  labels?: "left" | "right" | "top";
  when?: "before"; // its value when the step began
}

export type Corner = { equation: string; of: string[] };
export type Content = Slot[] | Corner | null;

export interface Block {
  title: string;
  rows: Content[][];
}

const one = (name: string, labels?: Slot["labels"], isTransposed?: boolean): Slot[] => [
  { name, ...(labels && { labels }), ...(isTransposed && { isTransposed }) },
];

const FORWARD: Block[] = [
  {
    title: "Scores, weights, values",
    rows: [
      [
        { equation: "S = Q Kᵀ", of: ["s"] },
        one("k", "top", true),
        { equation: "O = O · rescale + P V", of: ["o"] },
      ],
      [one("q", "left"), one("s"), one("v", "right")],
      [
        [
          { name: "row_max", when: "before", labels: "left" },
          { name: "row_max" },
          { name: "rescale" },
          { name: "row_sum" },
        ],
        one("p"),
        one("o"),
      ],
    ],
  },
];

const DKV: Block[] = [
  {
    title: "The weights again, and dV",
    rows: [
      [
        { equation: "Sᵀ = K Qᵀ", of: ["sT", "pT"] },
        [
          { name: "q", isTransposed: true, labels: "top" },
          { name: "row_max", isTransposed: true },
          { name: "sum_log2", isTransposed: true },
        ],
        { equation: "dV = dV + Pᵀ dO", of: ["dv"] },
      ],
      [one("k", "left"), one("sT"), one("do", "right")],
      [null, one("pT", "left"), one("dv")],
    ],
  },
  {
    title: "How the scores should change, and dK",
    rows: [
      [
        { equation: "dPᵀ = V dOᵀ", of: ["dpT", "dsT"] },
        [
          { name: "do", isTransposed: true, labels: "top" },
          { name: "delta", isTransposed: true },
        ],
        { equation: "dK = dK + dSᵀ Q", of: ["dk"] },
      ],
      [one("v", "left"), one("dpT"), one("q", "right")],
      [null, one("dsT", "left"), one("dk")],
    ],
  },
];

const DQ: Block[] = [
  {
    title: "The weights again",
    rows: [
      [{ equation: "S = Q Kᵀ", of: ["s", "p"] }, one("k", "top", true), null],
      [one("q", "left"), one("s"), null],
      [[{ name: "row_max", labels: "left" }, { name: "sum_log2" }], one("p"), null],
    ],
  },
  {
    title: "How the scores should change, and dQ",
    rows: [
      [
        { equation: "dP = dO Vᵀ", of: ["dp", "ds"] },
        one("v", "top", true),
        { equation: "dQ = dQ + dS K", of: ["dq"] },
      ],
      [one("do", "left"), one("dp"), one("k", "right")],
      [[{ name: "delta", labels: "left" }], one("ds"), one("dq")],
    ],
  },
];

// Q, K and V stay in shared memory, where the copy engine has put them: a warpgroup holds none of them.
const HOPPER: Block[] = [
  {
    title: "What a warpgroup holds",
    rows: [
      [
        [
          { name: "row_max", when: "before", labels: "left" },
          { name: "row_max" },
          { name: "rescale" },
          { name: "row_sum" },
        ],
        one("s", "top"),
        one("o"),
      ],
      [null, one("p"), null],
    ],
  },
];

const COMBINE: Block[] = [
  {
    title: "One part joins the others",
    rows: [
      [[{ name: "lse", labels: "left" }, { name: "a" }, { name: "b" }], one("part_o"), one("o")],
      [
        [{ name: "row_max", when: "before", labels: "left" }, { name: "row_max" }, { name: "row_sum" }],
        null,
        null,
      ],
    ],
  },
];

export const RECIPES: Record<PassName, Block[]> = {
  forward: FORWARD,
  splits: FORWARD,
  hopper: HOPPER,
  combine: COMBINE,
  dkv: DKV,
  dq: DQ,
};

/** Every variable that a recipe has a place for. */
export function placed(name: PassName): Set<string> {
  return new Set(
    RECIPES[name].flatMap((block) =>
      block.rows
        .flat()
        .flatMap((content) => (Array.isArray(content) ? content.map((slot) => slot.name) : [])),
    ),
  );
}
