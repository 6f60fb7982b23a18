import { Worker } from "node:worker_threads";
import { compareValues, type Value } from "convex/values";
import { expect, test } from "vitest";
import { isSame } from "../../convex/isSame";

const VALUES: Value[] = [
  null,
  true,
  false,
  0,
  -0,
  1,
  1.5,
  Number.NaN,
  "",
  "0",
  "é",
  [],
  [null],
  [0],
  [0, 1],
  [1, 0],
  [[0, 1]],
  {},
  { a: null },
  { a: 1 },
  { a: 1, b: 2 },
  { a: 1, c: 2 },
  { a: { b: [] } },
  { a: { b: {} } },
  { toString: 1 },
  { 0: 0 },
];

test("every value is the same as its copy, and as no other: what Convex itself says", () => {
  for (const [place, left] of VALUES.entries()) {
    for (const [other, right] of structuredClone(VALUES).entries()) {
      const says = `${JSON.stringify(left)} and ${JSON.stringify(right)}`;
      expect([says, isSame(left, right)]).toEqual([says, place === other]);
      expect(isSame(left, right)).toBe(compareValues(left, right) === 0);
    }
  }
});

test("the order of fields is nothing", () => {
  expect(isSame({ a: 1, b: { c: 2, d: 3 } }, { b: { d: 3, c: 2 }, a: 1 })).toBe(true);
});

test("bytes are nothing that the worker brings", () => {
  expect(isSame({ a: new ArrayBuffer(0) }, { a: {} })).toBe(false);
  expect(isSame({ a: [] }, { a: new ArrayBuffer(0) })).toBe(false);
});

test.each(["null", "true", '""', '{"a":0,"b":true}'])(
  "a document of 1 MiB of %s is compared within the memory of a function",
  async (small) => {
    const bytes = { null: 1, true: 1, '""': 2 }[small] ?? 16; // each, by Convex' own count
    const rows = Math.floor((1 << 20) / bytes / 8192);
    const run = `
      const isSame = ${isSame};
      const text = "[" + Array(${rows}).fill("[" + Array(8192).fill(${JSON.stringify(small)}).join() + "]").join() + "]";
      require("node:worker_threads").parentPort.postMessage(isSame(JSON.parse(text), JSON.parse(text)));
    `;
    const worker = new Worker(run, {
      eval: true,
      resourceLimits: { maxOldGenerationSizeMb: 60, maxYoungGenerationSizeMb: 4 },
    });
    const answer = new Promise((resolve, reject) => worker.once("message", resolve).once("error", reject));
    expect(await answer).toBe(true);
  },
);
