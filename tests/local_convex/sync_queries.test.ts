import { expect, test, vi } from "vitest";
import { Backend } from "../../dev/local_convex/backend.js";
import { type FunctionPath, loadFunctions } from "../../dev/local_convex/functions.js";
import { NOBODY } from "../../dev/local_convex/identity.js";
import { WatchedQueries } from "../../dev/local_convex/sync_queries.js";
import { TEST_FUNCTIONS } from "./running.js";

const path = (name: string): FunctionPath => ({ module: "notes", name });

test("only the queries that read a written table run again", async () => {
  const backend = new Backend(await loadFunctions(TEST_FUNCTIONS));
  const queries = new WatchedQueries();
  backend.onCommit((commit) => void queries.invalidate(commit));
  const run = vi.spyOn(backend, "runQuery");
  const refresh = async () => {
    run.mockClear();
    const modifications = await queries.refresh(backend, NOBODY, (queryId, outcome) => [queryId, outcome.ok]);
    return { ran: run.mock.calls.map(([call]) => call.path.name), told: modifications };
  };
  queries.add(1, path("count"), { author: "a" });
  queries.add(2, path("names"), {});
  expect(await refresh()).toEqual({
    ran: ["count", "names"],
    told: [
      [1, true],
      [2, true],
    ],
  });
  expect(await refresh()).toEqual({ ran: [], told: [] });

  await backend.run({ kind: "mutation", path: path("addName"), args: { name: "n" }, identity: NOBODY });
  // What it gives prints as before, so there is nothing to tell.
  expect(await refresh()).toEqual({ ran: ["names"], told: [] });

  await backend.run({ kind: "mutation", path: path("addAndFail"), args: { author: "a" }, identity: NOBODY });
  expect(await refresh()).toEqual({ ran: [], told: [] });

  queries.remove(1);
  expect(await refresh()).toEqual({ ran: [], told: [{ type: "QueryRemoved", queryId: 1 }] });
});
