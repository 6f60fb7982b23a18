import { afterEach, expect, test, vi } from "vitest";
import { Backend } from "../../dev/local_convex/backend.js";
import { DocumentIndex } from "../../dev/local_convex/document_index.js";
import { loadFunctions, parseFunctionPath } from "../../dev/local_convex/functions.js";
import { TEST_FUNCTIONS } from "./running.js";

// How much is read shows in no answer, so these look at what the index is asked for.
afterEach(() => vi.restoreAllMocks());

const ADMIN = { kind: "admin", user: null } as const;

async function filled(count: number) {
  const backend = new Backend(await loadFunctions(TEST_FUNCTIONS));
  const pulled: unknown[] = [];
  const scan = DocumentIndex.prototype.scan;
  vi.spyOn(DocumentIndex.prototype, "scan").mockImplementation(function* (this: DocumentIndex, ...args) {
    for (const document of scan.apply(this, args)) {
      pulled.push(document._id);
      yield document;
    }
  });
  const call = async (name: string, args: Record<string, string | number | object>) => {
    const path = parseFunctionPath(`notes:${name}`);
    if (path === null) throw new Error("no path");
    pulled.length = 0;
    const outcome = await backend.run({ kind: "any", path, args: args as never, identity: ADMIN });
    if (!outcome.ok) throw new Error(outcome.message);
    return outcome.value as never;
  };
  await call("addMany", { author: "a", from: 0, count });
  return { call, pulled };
}

test.each(["asc", "desc"] as const)("a page, %s, reads from its cursor and not from the start", async (order) => {
  const { call, pulled } = await filled(300);
  let cursor: string | null = null;
  for (const pages of [1, 2, 3]) {
    const page: { ranks: number[]; continueCursor: string } = await call("page", {
      paginationOpts: { numItems: 50, cursor },
      author: "a",
      order,
    });
    cursor = page.continueCursor;
    expect(page.ranks[0]).toBe(order === "asc" ? (pages - 1) * 50 : 299 - (pages - 1) * 50);
    // One more than the page holds, to know whether there is another.
    expect(pulled.length).toBe(51);
  }
});

test("a limit reads no more documents than it returns", async () => {
  const { call, pulled } = await filled(300);
  await call("ranks", { author: "a", limit: 7, order: "desc" });
  expect(pulled.length).toBe(7);
});
