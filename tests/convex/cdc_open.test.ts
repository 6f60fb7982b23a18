import { expect, test } from "vitest";
import { internal } from "../../convex/_generated/api";
import { type Deployment, newDeployment, refusal, theOnly } from "./deployment";

let readers = 0;

function open(t: Deployment, { shard = "a", shards = 2, reader = `r${++readers}`, atLeast = 0, saves = 0 } = {}) {
  return t.mutation(internal.cdc.open, { shard, shards, reader, atLeast, saves });
}

test("a deployment takes its identity from its first reader, and keeps it", async () => {
  const t = newDeployment();
  const { deployment } = await open(t, { reader: "d1" });
  expect(deployment).toMatch(/^d1@\d+$/);
  expect(await open(t, { reader: "d2", shard: "b" })).toMatchObject({ deployment });
});

test("a call that comes late to a deployment that was emptied gives it another identity", async () => {
  const t = newDeployment();
  const { deployment } = await open(t, { reader: "d1" });
  await t.run(async (ctx) => {
    for (const table of ["cdcCounter", "cdcShards"] as const) {
      for (const { _id } of await ctx.db.query(table).collect()) await ctx.db.delete(table, _id);
    }
  });
  await new Promise((resolve) => setTimeout(resolve, 5));
  expect((await open(t, { reader: "d1" })).deployment).not.toBe(deployment);
});

test("the epoch rises across all shards, from 1", async () => {
  const t = newDeployment();
  expect(await open(t, { shard: "a" })).toMatchObject({ epoch: 1 });
  expect(await open(t, { shard: "b" })).toMatchObject({ epoch: 2 });
  expect(await open(t, { shard: "a" })).toMatchObject({ epoch: 3 });
  expect(await theOnly(t, "cdcCounter")).toMatchObject({ epoch: 3 });
});

test("the epoch is above atLeast, and stays above it for all shards", async () => {
  const t = newDeployment();
  expect(await open(t, { atLeast: 41 })).toMatchObject({ epoch: 42 });
  expect(await open(t, { shard: "b", atLeast: 7 })).toMatchObject({ epoch: 43 });
  expect(await open(t, { shard: "b", atLeast: 43 })).toMatchObject({ epoch: 44 });
});

test("previous is the shard's epoch before, null at first", async () => {
  const t = newDeployment();
  expect(await open(t, { shard: "a" })).toMatchObject({ previous: null });
  expect(await open(t, { shard: "b" })).toMatchObject({ previous: null });
  expect(await open(t, { shard: "a" })).toMatchObject({ previous: 1 });
  expect(await open(t, { shard: "a" })).toMatchObject({ previous: 3 });
});

test("a reader that repeats its call gets a new epoch, and hears the same of what was before", async () => {
  const t = newDeployment();
  await open(t);
  expect(await open(t, { reader: "again" })).toMatchObject({ epoch: 2, previous: 1 });
  expect(await open(t, { reader: "again" })).toMatchObject({ epoch: 3, previous: 1 });
  expect(await open(t)).toMatchObject({ epoch: 4, previous: 3 });
});

test("what the reader before had saved is told to the next one, and to no other shard's", async () => {
  const t = newDeployment();
  const { epoch } = await open(t, { saves: 3 });
  await open(t, { shard: "b", saves: 90 });
  expect(await open(t, { reader: "next", saves: 4 })).toMatchObject({ previousSaves: 3 });
  expect(await open(t, { reader: "next", saves: 4 })).toMatchObject({ previousSaves: 3 });
  const note = (epoch: number, saves: number) => t.mutation(internal.cdc.noteSaves, { shard: "a", epoch, saves });
  expect(await note(epoch, 80)).toBeNull(); // a reader that was replaced
  expect(await open(t)).toMatchObject({ previousSaves: 4 });
  expect(await note(5, 7)).toBe(0);
  expect(await note(5, 7)).toBe(7);
  expect(await open(t)).toMatchObject({ previousSaves: 7, epoch: 6 });
});

test("another number of shards shuts all that there were", async () => {
  const t = newDeployment();
  const first = await open(t, { shard: "a", shards: 1 });
  const probe = (shard: string, epoch: number) => t.mutation(internal.cdc.apply, { shard, epoch, events: [] });
  expect(await probe("a", first.epoch)).toMatchObject({ outcome: "applied" });
  const second = await open(t, { shard: "b", shards: 2 });
  expect(await probe("a", first.epoch)).toEqual({ outcome: "fenced", epoch: null });
  expect(await probe("b", second.epoch)).toMatchObject({ outcome: "applied" });
  expect(await open(t, { shard: "a", shards: 2 })).toMatchObject({ previous: null, previousSaves: 0 });
  expect(await probe("b", second.epoch)).toMatchObject({ outcome: "applied" });
});

test.each([0, 65, 1.5])("%d shards are refused", async (shards) => {
  expect(await refusal(open(newDeployment(), { shards }), "invalid_argument")).toMatch(/^shards must be an integer/);
});

test.each([-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, Number.MAX_SAFE_INTEGER])(
  "atLeast %d is refused",
  async (atLeast) => {
    const message = await refusal(open(newDeployment(), { atLeast }), "invalid_argument");
    expect(message).toBe(`atLeast must be an integer from 0 to ${Number.MAX_SAFE_INTEGER - 1}, not ${atLeast}.`);
  },
);
