import { describe, expect, test } from "vitest";
import { internal } from "../../convex/_generated/api";
import {
  activityEvent,
  applyEvents,
  type Deployment,
  insertLarge,
  newDeployment,
  openShard,
  refusal,
  statusEvent,
} from "./deployment";

async function filled(): Promise<Deployment> {
  const t = newDeployment();
  const epoch = await openShard(t);
  const keys = ["b", "a:x", "c", '["a",1]', "é"].map((key) => `check-ins:${key}`);
  const others = ["check-in:z", "check-ins2:z", "check-ins;z:z", "alerts:z"];
  const verdicts = await applyEvents(t, epoch, ...[...keys, ...others].map((key, i) => activityEvent(i, {}, key)));
  expect(new Set(verdicts)).toEqual(new Set(["applied"]));
  await applyEvents(t, epoch, ...["u2", "u1", "u3"].map((user, i) => statusEvent(100 + i, {}, user)));
  await t.mutation(internal.activities.addActivity, {
    userId: "u1",
    type: "alert",
    description: "",
    timestamp: 1,
    idempotencyKey: "k",
  });
  return t;
}

function keys(t: Deployment, target: "activity" | "status", after: string | null, limit: number, mirror = "check-ins") {
  return t.query(internal.cdc.keys, { mirror, target, after, limit });
}

describe("keys", () => {
  test("of an activity mirror are its own, in order", async () => {
    expect(await keys(await filled(), "activity", null, 10)).toEqual(['["a",1]', "a:x", "b", "c", "é"]);
  });

  test("of an activity mirror come in pages", async () => {
    const t = await filled();
    expect(await keys(t, "activity", null, 2)).toEqual(['["a",1]', "a:x"]);
    expect(await keys(t, "activity", "a:x", 2)).toEqual(["b", "c"]);
    expect(await keys(t, "activity", "bb", 1)).toEqual(["c"]);
    expect(await keys(t, "activity", "é", 2)).toEqual([]);
  });

  test("of a status mirror are user ids, in pages", async () => {
    const t = await filled();
    expect(await keys(t, "status", null, 2)).toEqual(["u1", "u2"]);
    expect(await keys(t, "status", "u2", 2)).toEqual(["u3"]);
  });

  test("of large documents come in shorter pages, so that no call fails", async () => {
    const t = newDeployment();
    const all = Array.from("abcdefghijklmnopqrst");
    await insertLarge(
      t,
      all.map((key) => `check-ins:${key}`),
    );
    const first = await keys(t, "activity", null, 1000);
    const second = await keys(t, "activity", first.at(-1) ?? null, 1000);
    const third = await keys(t, "activity", second.at(-1) ?? null, 1000);
    expect([first, second, third]).toEqual([all.slice(0, 9), all.slice(9, 18), all.slice(18)]);
    expect(await keys(t, "activity", "t", 1000)).toEqual([]);
  });

  test("of a mirror without documents are none", async () => {
    expect(await keys(await filled(), "activity", null, 10, "nothing")).toEqual([]);
  });

  test.each([0, 1001, 1.5, Number.NaN])("refuses the limit %d", async (limit) => {
    const message = await refusal(keys(newDeployment(), "activity", null, limit), "invalid_argument");
    expect(message).toBe(`limit must be an integer from 1 to 1000, not ${limit}.`);
  });
});
