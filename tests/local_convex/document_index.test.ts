import { compareValues } from "convex/values";
import { expect, test, vi } from "vitest";
import { type Document, DocumentIndex, type KeyRange } from "../../dev/local_convex/document_index.js";
import { LazyList } from "../../dev/local_convex/lazy_list.js";
import { AFTER, compareKeys, type IndexKey } from "../../dev/local_convex/value_order.js";

const compared = vi.hoisted(() => ({ times: 0 }));
vi.mock(import("../../dev/local_convex/value_order.js"), async (original) => {
  const order = await original();
  const compareKeys: typeof order.compareKeys = (a, b) => {
    compared.times += 1;
    return order.compareKeys(a, b);
  };
  return { ...order, compareKeys };
});

const FIELDS = ["n", "_id"];
const EVERYTHING: KeyRange = { from: [], to: [AFTER] };
const id = (n: number) => `${String(n).padStart(6, "0")}t`;
const document = (n: number): Document => ({ _id: id(n), _creationTime: n, n });

function filled(count: number): DocumentIndex {
  const index = new DocumentIndex();
  index.ensure("t", FIELDS);
  for (let n = 0; n < count; n += 1) index.set(id(n), document(n));
  return index;
}
const read = (index: DocumentIndex, order: "asc" | "desc" = "asc") =>
  [...index.scan("t", FIELDS, EVERYTHING, order)].map((each) => each.n);

test("keys compare as the values of Convex do", () => {
  const values = [
    undefined,
    null,
    5n,
    -1,
    -0,
    0,
    0.5,
    Infinity,
    NaN,
    false,
    true,
    "",
    "a",
    "ab",
    "b",
    "\ud7ff",
    "\ue000",
    "🙂",
    [1],
    { a: 1 },
  ];
  for (const left of values) {
    for (const right of values) {
      expect(Math.sign(compareKeys([left], [right]))).toBe(Math.sign(compareValues(left, right)));
    }
  }
});

test.each([
  ["a prefix sorts before what it begins", ["a"], ["a", undefined]],
  ["AFTER sorts behind every value", ["a", { z: 1 }], ["a", AFTER]],
  ["but only in its place", ["a", AFTER], ["b"]],
] as [string, IndexKey, IndexKey][])("%s", (_, lower, higher) => {
  expect(compareKeys(lower, higher)).toBeLessThan(0);
  expect(compareKeys(higher, lower)).toBeGreaterThan(0);
});

test("a document that changes or goes is in one place or none", () => {
  const index = filled(3);
  index.set(id(0), { ...document(0), n: 9 });
  index.set(id(1), null);
  expect(read(index)).toEqual([2, 9]);
  expect([...index.all("t")].length).toBe(2);
});

test.each(["asc", "desc"] as const)("a scan, %s, goes on while others write", (order) => {
  const index = filled(1000);
  const seen: unknown[] = [];
  for (const each of index.scan("t", FIELDS, EVERYTHING, order)) {
    seen.push(each.n);
    index.set(each._id, null);
    index.set(id(5000 + seen.length), { ...document(0), _id: id(5000 + seen.length), n: -1 });
  }
  const all = Array.from({ length: 1000 }, (_, n) => n);
  // What is written meanwhile in front of the scan is met, which in this order is where a scan comes to last.
  expect(seen.filter((n) => n !== -1)).toEqual(order === "asc" ? all : all.reverse());
});

test("reading one document compares about as many keys among 50,000 as among 50", () => {
  const comparisons = (count: number) => {
    const index = filled(count);
    const before = compared.times;
    for (let time = 0; time < 500; time += 1) {
      const n = (time * 7919) % count;
      const range: KeyRange = { from: [n], to: [n, AFTER] };
      expect(index.scan("t", FIELDS, range, "asc").next().value).toMatchObject({ n });
    }
    return compared.times - before;
  };
  // A scan would compare a thousand times as many; a tree is a few levels deeper.
  expect(comparisons(50_000)).toBeLessThan(4 * comparisons(50));
});

test("a lazy list reads one more than it is asked for, to know its end", () => {
  let pulled = 0;
  const source = (function* () {
    while (pulled < 3) {
      pulled += 1;
      yield `item ${pulled}`;
    }
  })();
  const list = LazyList.over(source);
  expect([list.length, pulled]).toEqual([1, 1]);
  expect(list[0]).toBe("item 1");
  expect([list.length, pulled]).toEqual([2, 2]);
  expect([list[2], list.length, list[3]]).toEqual(["item 3", 3, undefined]);
});
