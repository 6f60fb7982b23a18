import { expect, test } from "vitest";
import { internal } from "../../convex/_generated/api";
import { type Deployment, newDeployment, refusal, theOnly } from "./deployment";

let readers = 0;

function open(t: Deployment, { shard = "a", reader = `r${++readers}`, atLeast = 0 } = {}) {
  return t.mutation(internal.cdc.open, { shard, reader, atLeast });
}

test("a deployment takes its identity from its first reader, and keeps it", async () => {
  const t = newDeployment();
  expect(await open(t, { reader: "d1" })).toMatchObject({ deployment: "d1" });
  expect(await open(t, { reader: "d2", shard: "b" })).toMatchObject({ deployment: "d1" });
});

test("the epoch rises across all shards, from 1", async () => {
  const t = newDeployment();
  expect(await open(t, { shard: "a", reader: "d1" })).toMatchObject({ epoch: 1 });
  expect(await open(t, { shard: "b" })).toMatchObject({ epoch: 2 });
  expect(await open(t, { shard: "a" })).toMatchObject({ epoch: 3 });
  expect(await theOnly(t, "cdcCounter")).toMatchObject({ deployment: "d1", epoch: 3 });
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

test.each([-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, Number.MAX_SAFE_INTEGER])(
  "atLeast %d is refused",
  async (atLeast) => {
    const message = await refusal(open(newDeployment(), { atLeast }), "invalid_argument");
    expect(message).toBe(`atLeast must be an integer from 0 to ${Number.MAX_SAFE_INTEGER - 1}, not ${atLeast}.`);
  },
);
