import { expect, test } from "vitest";
import { internal } from "../../convex/_generated/api";
import { type Deployment, newDeployment, refusal, theOnly } from "./deployment";

let readers = 0;

function open(t: Deployment, { shard = "a", shards = 2, reader = `r${++readers}`, atLeast = 0, saves = 0 } = {}) {
  return t.mutation(internal.cdc.open, { shard, shards, reader, atLeast, saves });
}

function probe(t: Deployment, shard: string, epoch: number) {
  return t.mutation(internal.cdc.apply, { shard, epoch, events: [] });
}

/** The two readings of the clock that a test compares must not be of one and the same millisecond. */
function passTime(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 5));
}

test("a deployment takes its identity from its first reader, and keeps it", async () => {
  const t = newDeployment();
  const { deployment } = await open(t, { reader: "d1" });
  expect(deployment).toMatch(/^d1@\d+$/);
  expect(await open(t, { reader: "d2", shard: "b" })).toMatchObject({ deployment });
});

test("a call that comes late to a deployment that was emptied gives it another identity, and another epoch", async () => {
  const t = newDeployment();
  const { deployment, epoch } = await open(t, { reader: "d1", atLeast: 4 });
  await t.run(async (ctx) => {
    for (const table of ["cdcCounter", "cdcShards"] as const) {
      for (const { _id } of await ctx.db.query(table).collect()) await ctx.db.delete(table, _id);
    }
  });
  await passTime();
  const late = await open(t, { reader: "d1", atLeast: 4 });
  expect(late.deployment).not.toBe(deployment);
  expect(late.epoch).toBeGreaterThan(epoch);
  expect(await probe(t, "a", epoch)).toEqual({ outcome: "fenced", epoch: late.epoch });
});

test("a call that comes late to a deployment that was set back gives it another epoch", async () => {
  const t = newDeployment();
  const { epoch: before } = await open(t, { reader: "d1" });
  const { epoch } = await open(t, { reader: "d2", atLeast: before });
  await t.run(async (ctx) => {
    for (const { _id } of await ctx.db.query("cdcCounter").collect()) await ctx.db.patch(_id, { epoch: before });
    for (const { _id } of await ctx.db.query("cdcShards").collect()) {
      await ctx.db.patch(_id, { epoch: before, reader: "d1", previous: null });
    }
  });
  await passTime();
  const late = await open(t, { reader: "d2", atLeast: before });
  expect(late).toMatchObject({ previous: before });
  expect(late.epoch).toBeGreaterThan(epoch);
  expect(await probe(t, "a", epoch)).toEqual({ outcome: "fenced", epoch: late.epoch });
});

test("the epoch rises across all shards, and is above the time", async () => {
  const t = newDeployment();
  const start = Date.now();
  const a = await open(t, { shard: "a" });
  const b = await open(t, { shard: "b" });
  const again = await open(t, { shard: "a" });
  expect(a.epoch).toBeGreaterThan(start);
  expect(b.epoch).toBeGreaterThan(a.epoch);
  expect(again.epoch).toBeGreaterThan(b.epoch);
  expect(await theOnly(t, "cdcCounter")).toMatchObject({ epoch: again.epoch });
});

test("the epoch is above atLeast, and stays above it for all shards, also where the clock was set back", async () => {
  const t = newDeployment();
  const ahead = Date.now() + 1_000_000;
  expect(await open(t, { atLeast: ahead })).toMatchObject({ epoch: ahead + 1 });
  expect(await open(t, { shard: "b", atLeast: 7 })).toMatchObject({ epoch: ahead + 2 });
  expect(await open(t, { shard: "b", atLeast: ahead + 9 })).toMatchObject({ epoch: ahead + 10 });
});

test("previous is the shard's epoch before, null at first", async () => {
  const t = newDeployment();
  const a = await open(t, { shard: "a" });
  const b = await open(t, { shard: "b" });
  expect([a.previous, b.previous]).toEqual([null, null]);
  const second = await open(t, { shard: "a" });
  expect(second).toMatchObject({ previous: a.epoch });
  expect(await open(t, { shard: "a" })).toMatchObject({ previous: second.epoch });
});

test("a reader that repeats its call gets a new epoch, and hears the same of what was before", async () => {
  const t = newDeployment();
  const { epoch } = await open(t);
  const once = await open(t, { reader: "again" });
  const twice = await open(t, { reader: "again" });
  expect([once.previous, twice.previous]).toEqual([epoch, epoch]);
  expect(twice.epoch).toBeGreaterThan(once.epoch);
  expect(await open(t)).toMatchObject({ previous: twice.epoch });
});

test("what the reader before had saved is told to the next one, and to no other shard's", async () => {
  const t = newDeployment();
  const { epoch } = await open(t, { saves: 3 });
  await open(t, { shard: "b", saves: 90 });
  expect(await open(t, { reader: "next", saves: 4 })).toMatchObject({ previousSaves: 3 });
  expect(await open(t, { reader: "next", saves: 4 })).toMatchObject({ previousSaves: 3 });
  const note = (epoch: number, saves: number) => t.mutation(internal.cdc.noteSaves, { shard: "a", epoch, saves });
  expect(await note(epoch, 80)).toBeNull(); // a reader that was replaced
  const last = await open(t);
  expect(last).toMatchObject({ previousSaves: 4 });
  expect(await note(last.epoch, 7)).toBe(0);
  expect(await note(last.epoch, 7)).toBe(7);
  expect(await open(t)).toMatchObject({ previousSaves: 7 });
});

test("another number of shards shuts all that there were", async () => {
  const t = newDeployment();
  const first = await open(t, { shard: "a", shards: 1 });
  expect(await probe(t, "a", first.epoch)).toMatchObject({ outcome: "applied" });
  const second = await open(t, { shard: "b", shards: 2 });
  expect(await probe(t, "a", first.epoch)).toEqual({ outcome: "fenced", epoch: null });
  expect(await probe(t, "b", second.epoch)).toMatchObject({ outcome: "applied" });
  expect(await open(t, { shard: "a", shards: 2 })).toMatchObject({ previous: null, previousSaves: 0 });
  expect(await probe(t, "b", second.epoch)).toMatchObject({ outcome: "applied" });
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
