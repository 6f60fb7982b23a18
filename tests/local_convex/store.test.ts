import { ConvexHttpClient } from "convex/browser";
import { afterAll, beforeAll, expect, test } from "vitest";
import { api } from "./api.js";
import { post, type Running, startLocalConvex, TEST_FUNCTIONS } from "./running.js";

const { notes } = api;
let convex: Running;
let client: ConvexHttpClient;

beforeAll(async () => {
  convex = await startLocalConvex(TEST_FUNCTIONS);
  client = new ConvexHttpClient(convex.url, { logger: false });
  const mixed = [3, "b", 1, null, undefined, "a", 2, -0, 0, "🙂", "\uffee"];
  for (const rank of mixed)
    await client.mutation(notes.add, rank === undefined ? { author: "mixed" } : { author: "mixed", rank });
  await addMany("many", 0, 1000);
});
afterAll(() => convex.stop());

const addMany = async (author: string, from: number, count: number) => {
  const body = { path: "notes:addMany", args: { author, from, count } };
  const { json } = await post(`${convex.url}/api/mutation`, body, { Authorization: `Convex ${convex.adminKey}` });
  expect(json.status).toBe("success");
};
const ranks = (args: Record<string, unknown>) => client.query(notes.ranks, { author: "mixed", ...args });

// Absent, null, numbers, text: the order of Convex. Text by its bytes in UTF-8, where the emoji is the highest.
const ORDER = ["none", null, -0, 0, 1, 2, 3, "a", "b", "\uffee", "🙂"].map((rank) => rank ?? "none");

test("values of different types sort as in Convex", async () => {
  expect(await ranks({})).toEqual(ORDER);
  expect(await ranks({ order: "desc" })).toEqual([...ORDER].reverse());
});

test.each([
  ["eq", { eq: 2 }, [2]],
  ["eq null", { eq: null }, ["none"]],
  ["gt", { gt: 2, lte: 3 }, [3]],
  ["gte and lt", { gte: 1, lt: 3 }, [1, 2]],
  ["gt and lte of text", { gt: "a", lte: "\uffee" }, ["b", "\uffee"]],
  ["gte", { gte: "b" }, ["b", "\uffee", "🙂"]],
  ["lt", { lt: -0 }, ["none", "none"]],
  ["lte", { lte: -0 }, ["none", "none", -0]],
  ["nothing in between", { gt: 1, lt: 2 }, []],
  ["limit", { gte: 0, limit: 2 }, [0, 1]],
  ["limit from the end", { lte: 3, limit: 2, order: "desc" }, [3, 2]],
])("a range by %s", async (_, bounds, expected) => {
  expect(await ranks(bounds)).toEqual(expected);
});

test("a range of another author is not touched", async () => {
  const mixed = await client.query(notes.ranks, { author: "mixe" });
  expect(mixed).toEqual([]);
});

test.each(["asc", "desc"] as const)("pages, %s, hold everything once", async (order) => {
  const seen: unknown[] = [];
  let cursor: string | null = null;
  let pages = 0;
  for (let isDone = false; !isDone; pages += 1) {
    const page: { ranks: unknown[]; isDone: boolean; continueCursor: string } = await client.query(notes.page, {
      paginationOpts: { numItems: 300, cursor },
      author: "many",
      order,
    });
    seen.push(...page.ranks);
    ({ isDone, continueCursor: cursor } = page);
  }
  const all = Array.from({ length: 1000 }, (_, rank) => rank);
  expect(seen).toEqual(order === "asc" ? all : all.reverse());
  expect(pages).toBe(4);
});

test("a mutation reads what it has written, and what it undid is gone from every index", async () => {
  await addMany("moved", 0, 100);
  const moved = Array.from({ length: 99 }, (_, place) => place + 1001);
  expect(await client.mutation(notes.renumber, { author: "moved", by: 1000 })).toEqual(moved);
  expect(await client.query(notes.ranks, { author: "moved" })).toEqual(moved);
  await client.mutation(notes.addAndFail, { author: "moved" }).catch(() => undefined);
  expect(await client.query(notes.ranks, { author: "moved" })).toEqual(moved);
  expect(await client.query(notes.count, { author: "moved" })).toBe(99);
});

const nested = (levels: number): unknown => (levels === 0 ? 1 : { deeper: nested(levels - 1) });

test.each([
  ["a document of more than 1 MiB", { extra: "x".repeat(1 << 20) }, "too large"],
  ["17 levels", { extra: nested(16) }, "too nested"],
  ["an array of 8,193", { extra: new Array(8193).fill(0) }, "too long"],
  [
    "1,025 fields",
    { extra: Object.fromEntries(Array.from({ length: 1025 }, (_, n) => [`f${n}`, 0])) },
    "too many fields",
  ],
  ["a field name of 1,025", { extra: { ["n".repeat(1025)]: 0 } }, "Field name"],
  ["a field name that is not ASCII", { extra: { ä: 0 } }, "Field name"],
  ["an empty field name", { extra: { "": 0 } }, "Field name"],
])("%s is too much", async (_, note, reason) => {
  const { status, json } = await post(`${convex.url}/api/mutation`, {
    path: "notes:add",
    args: { author: "limits", ...note },
  });
  expect([status, json.status]).toEqual([200, "error"]);
  expect(json.errorMessage).toContain(reason);
  expect(json).not.toHaveProperty("errorData");
  expect(await client.query(notes.count, { author: "limits" })).toBe(0);
});

test.each([
  ["nearly 1 MiB", { extra: "x".repeat((1 << 20) - 200) }],
  ["16 levels", { extra: nested(15) }],
  ["an array of 8,192", { extra: new Array(8192).fill(0) }],
  ["1,024 fields", { extra: Object.fromEntries(Array.from({ length: 1024 }, (_, n) => [`f${n}`, 0])) }],
])("%s is not too much", async (_, note) => {
  await client.mutation(notes.add, { author: "within limits", ...note });
});

test("4,096 index ranges may be read, and no more", async () => {
  await client.query(notes.readAgain, { times: 4096 });
  await expect(client.query(notes.readAgain, { times: 4097 })).rejects.toThrow("Too many index ranges");
});

test("a patch counts as an index range read", async () => {
  // 2,048 documents: one range for all of them, one each for the patches, one for each read of the test's function.
  await addMany("patched", 0, 4000);
  await client.mutation(notes.renumber, { author: "patched", by: 1 });
  await addMany("patched", 5000, 200);
  await expect(client.mutation(notes.renumber, { author: "patched", by: 1 })).rejects.toThrow("Too many index ranges");
});

test("16,000 documents may be written, and no more", async () => {
  await addMany("written", 0, 16_000);
  await expect(addMany("written", 20_000, 16_001)).rejects.toThrow();
  expect(await client.query(notes.ranks, { author: "written", gte: 16_000 })).toEqual([]);
}, 60_000);
