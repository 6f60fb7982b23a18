import { afterEach, expect, test, vi } from "vitest";
import { internal } from "../../convex/_generated/api";
import crons from "../../convex/crons";
import { type Deployment, everything, newDeployment } from "./deployment";

const DAY_MS = 24 * 60 * 60 * 1000;

afterEach(() => {
  vi.useRealTimers();
});

async function bury(t: Deployment, count: number, age: number): Promise<void> {
  const at = Date.now() - age;
  await t.run(async (ctx) => {
    for (let i = 0; i < count; i++) {
      await ctx.db.insert("cdcTombstones", { key: `m:${age}:${i}`, version: { epoch: 1, number: i }, at });
    }
  });
}

test("a tombstone is kept for a day and then removed", async () => {
  vi.useFakeTimers({ now: 1_000_000_000_000 });
  const t = newDeployment();
  await bury(t, 1, DAY_MS);
  await bury(t, 2, DAY_MS + 1);
  await t.mutation(internal.cdc.prune, {});
  expect(await everything(t, "cdcTombstones")).toMatchObject([{ key: `m:${DAY_MS}:0` }]);
});

test("one run removes 500 and leaves the rest to runs that follow at once", async () => {
  vi.useFakeTimers({ now: 1_000_000_000_000 });
  const t = newDeployment();
  await bury(t, 1001, DAY_MS + 1);
  await bury(t, 3, 0);
  await t.mutation(internal.cdc.prune, {});
  expect(await everything(t, "cdcTombstones")).toHaveLength(504);
  await t.finishAllScheduledFunctions(vi.runAllTimers);
  expect(await everything(t, "cdcTombstones")).toHaveLength(3);
});

test("a run that follows begins where the one before it ended", async () => {
  vi.useFakeTimers({ now: 1_000_000_000_000 });
  const t = newDeployment();
  await bury(t, 400, DAY_MS + 3);
  await bury(t, 200, DAY_MS + 2);
  await t.mutation(internal.cdc.prune, {});
  const [next] = await t.run((ctx) => ctx.db.system.query("_scheduled_functions").collect());
  const from = Date.now() - DAY_MS - 2;
  expect(next).toMatchObject({ name: "cdc:prune", args: [{ from }] });
  await bury(t, 1, DAY_MS + 3);
  await t.mutation(internal.cdc.prune, { from });
  expect(await everything(t, "cdcTombstones")).toMatchObject([{ at: from - 1 }]);
});

test("a cron prunes every hour", () => {
  expect(Object.values(crons.crons)).toEqual([
    { name: "cdc:prune", args: [{}], schedule: { type: "interval", hours: 1 } },
  ]);
});
