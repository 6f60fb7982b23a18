import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { api, internal } from "../../convex/_generated/api";
import {
  activityEvent,
  applyEvents,
  everything,
  insertLarge,
  newDeployment,
  openShard,
  refusal,
  theOnly,
  USER,
} from "./deployment";

afterEach(() => {
  vi.unstubAllEnvs();
});

function activity(timestamp: number, userId = USER) {
  return { userId, type: "conversation" as const, description: `at ${timestamp}`, timestamp };
}

describe("getRecentActivities", () => {
  beforeEach(() => {
    vi.stubEnv("ALLOW_PUBLIC_READS", "true");
  });

  test("answers with the user's activities, newest first", async () => {
    const t = newDeployment();
    for (const timestamp of [2, 3, 1]) await t.mutation(internal.activities.addActivity, activity(timestamp));
    await t.mutation(internal.activities.addActivity, activity(9, "u2"));
    const recent = await t.query(api.activities.getRecentActivities, { userId: USER });
    expect(recent.map(({ timestamp }) => timestamp)).toEqual([3, 2, 1]);
  });

  test("answers without the mirror's bookkeeping", async () => {
    const t = newDeployment();
    await applyEvents(t, await openShard(t), activityEvent(1, { metadata: { mood: "good" } }));
    expect(await t.query(api.activities.getRecentActivities, { userId: USER })).toEqual([
      {
        _id: expect.any(String),
        _creationTime: expect.any(Number),
        userId: USER,
        type: "check-in",
        description: "Checked in",
        timestamp: 1000,
        metadata: { mood: "good" },
      },
    ]);
  });

  test("shows 20 unless told otherwise, and at most 100", async () => {
    const t = newDeployment();
    await t.run(async (ctx) => {
      for (let timestamp = 0; timestamp < 101; timestamp++) await ctx.db.insert("activities", activity(timestamp));
    });
    const count = async (limit?: number) =>
      (
        await t.query(
          api.activities.getRecentActivities,
          limit === undefined ? { userId: USER } : { userId: USER, limit },
        )
      ).length;
    expect(await count()).toBe(20);
    expect(await count(1)).toBe(1);
    expect(await count(100)).toBe(100);
  });

  test("shows fewer where they are large, and fails for none of that", async () => {
    const t = newDeployment();
    await insertLarge(
      t,
      Array.from({ length: 20 }, (_, i) => `check-ins:${i}`),
    );
    const recent = await t.query(api.activities.getRecentActivities, { userId: USER });
    expect(recent.map(({ timestamp }) => timestamp)).toEqual([19, 18, 17, 16, 15, 14, 13, 12, 11]);
  });

  test.each([0, 101, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY])("refuses the limit %d", async (limit) => {
    const t = newDeployment();
    const call = t.query(api.activities.getRecentActivities, { userId: USER, limit });
    expect(await refusal(call, "invalid_argument")).toBe(`limit must be an integer from 1 to 100, not ${limit}.`);
  });
});

describe("who may read activities", () => {
  test.each([undefined, "", "1", "false", "TRUE"])(
    "nobody without a login, ALLOW_PUBLIC_READS being %j",
    async (value) => {
      vi.stubEnv("ALLOW_PUBLIC_READS", value);
      const t = newDeployment();
      const message = await refusal(t.query(api.activities.getRecentActivities, { userId: USER }), "unauthenticated");
      expect(message).toContain("ALLOW_PUBLIC_READS=true");
      expect(message).toContain("auth.config.ts");
    },
  );

  test("a user's own, and nobody else's", async () => {
    const t = newDeployment();
    await t.mutation(internal.activities.addActivity, activity(1));
    const own = await t.withIdentity({ subject: USER }).query(api.activities.getRecentActivities, { userId: USER });
    expect(own).toHaveLength(1);
    const other = t.withIdentity({ subject: "u2" }).query(api.activities.getRecentActivities, { userId: USER });
    expect(await refusal(other, "forbidden")).toContain("another one is logged in");
  });

  test("anyone where reads are public", async () => {
    vi.stubEnv("ALLOW_PUBLIC_READS", "true");
    const t = newDeployment();
    await t.mutation(internal.activities.addActivity, activity(1));
    expect(await t.query(api.activities.getRecentActivities, { userId: USER })).toHaveLength(1);
    const other = t.withIdentity({ subject: "u2" }).query(api.activities.getRecentActivities, { userId: USER });
    expect(await other).toHaveLength(1);
  });
});

describe("addActivity", () => {
  test("stores what it is given and returns the id", async () => {
    const t = newDeployment();
    const given = { ...activity(5), metadata: { channel: "sms" } };
    const id = await t.mutation(internal.activities.addActivity, given);
    expect(await theOnly(t, "activities")).toEqual({ ...given, _id: id, _creationTime: expect.any(Number) });
  });

  test("returns the first id for the same idempotency key, and changes nothing", async () => {
    const t = newDeployment();
    const first = await t.mutation(internal.activities.addActivity, { ...activity(5), idempotencyKey: "k" });
    const again = await t.mutation(internal.activities.addActivity, { ...activity(6), idempotencyKey: "k" });
    expect(again).toBe(first);
    expect(await theOnly(t, "activities")).toMatchObject({ ...activity(5), key: "app:k" });
  });

  test("refuses an idempotency key that another user's activity has", async () => {
    const t = newDeployment();
    const add = (userId: string) =>
      t.mutation(internal.activities.addActivity, { ...activity(5, userId), idempotencyKey: "k" });
    const first = await add(USER);
    expect(await refusal(add("u2"), "invalid_argument")).toBe("Another user's activity has this idempotencyKey.");
    expect(await add(USER)).toBe(first);
    expect(await theOnly(t, "activities")).toMatchObject({ userId: USER });
  });

  test("adds two for two keys, and for none", async () => {
    const t = newDeployment();
    for (const key of [{ idempotencyKey: "a" }, { idempotencyKey: "b" }, {}, {}]) {
      await t.mutation(internal.activities.addActivity, { ...activity(5), ...key });
    }
    expect(await everything(t, "activities")).toHaveLength(4);
  });

  test.each([Number.NaN, Number.NEGATIVE_INFINITY])("refuses the timestamp %d", async (timestamp) => {
    const call = newDeployment().mutation(internal.activities.addActivity, activity(timestamp));
    expect(await refusal(call, "invalid_argument")).toBe("timestamp must be a finite number.");
  });

  test("refuses a type that the schema does not know", async () => {
    const wrong = { ...activity(1), type: "party" as "alert" };
    await expect(newDeployment().mutation(internal.activities.addActivity, wrong)).rejects.toThrow("party");
  });
});
