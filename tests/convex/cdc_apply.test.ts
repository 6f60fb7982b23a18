import { describe, expect, test } from "vitest";
import { internal } from "../../convex/_generated/api";
import {
  type AnyEvent,
  activityEvent,
  applyEvents,
  type Deployment,
  deleteEvent,
  everything,
  newDeployment,
  openShard,
  SHARD,
  statusEvent,
  theOnly,
  USER,
} from "./deployment";

const SYSTEM = { _id: expect.any(String), _creationTime: expect.any(Number) };
const KEY = "check-ins:c1";

async function opened(): Promise<{ t: Deployment; epoch: number }> {
  const t = newDeployment();
  return { t, epoch: await openShard(t) };
}

describe("writing", () => {
  test("an activity appears whole, under its key and version", async () => {
    const { t, epoch } = await opened();
    const event = activityEvent(3, { metadata: { mood: "good" } });
    expect(await applyEvents(t, epoch, event)).toEqual(["applied"]);
    const expected = { ...SYSTEM, ...event.document, key: KEY, version: { epoch, number: 3 } };
    expect(await theOnly(t, "activities")).toEqual(expected);
  });

  test("a status appears whole, with its version", async () => {
    const { t, epoch } = await opened();
    const event = statusEvent(3, { lastCheckIn: 1, nextDue: 2, alertLevel: "L4", alertTriggeredAt: 5 });
    expect(await applyEvents(t, epoch, event)).toEqual(["applied"]);
    expect(await theOnly(t, "userStatus")).toEqual({ ...SYSTEM, ...event.document, version: { epoch, number: 3 } });
  });

  test("a higher number changes the same document, and removes the fields that are absent", async () => {
    const { t, epoch } = await opened();
    await applyEvents(
      t,
      epoch,
      activityEvent(1, { metadata: 1 }),
      statusEvent(2, { lastCheckIn: 1, alertLevel: "L1" }),
    );
    const [activity, status] = [await theOnly(t, "activities"), await theOnly(t, "userStatus")];
    const changes = [
      activityEvent(3, { description: "later" }),
      statusEvent(4, { nextDue: 9, alertLevel: null }),
    ] as const;
    expect(await applyEvents(t, epoch, ...changes)).toEqual(["applied", "applied"]);
    expect(await theOnly(t, "activities")).toEqual({
      ...SYSTEM,
      ...changes[0].document,
      _id: activity._id,
      key: KEY,
      version: { epoch, number: 3 },
    });
    expect(await theOnly(t, "userStatus")).toEqual({
      ...SYSTEM,
      ...changes[1].document,
      _id: status._id,
      version: { epoch, number: 4 },
    });
  });

  test("an activity may move to another user", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1), activityEvent(2, { userId: "u2" }));
    expect(await theOnly(t, "activities")).toMatchObject({ userId: "u2" });
  });

  test("a user's id may hold colons", async () => {
    const { t, epoch } = await opened();
    expect(await applyEvents(t, epoch, statusEvent(1, {}, "auth0:x:1"))).toEqual(["applied"]);
    expect(await applyEvents(t, epoch, statusEvent(2, { nextDue: 1 }, "auth0:x:1"))).toEqual(["applied"]);
    expect(await theOnly(t, "userStatus")).toMatchObject({ userId: "auth0:x:1", nextDue: 1 });
  });

  test("two events of one key in a batch work in order", async () => {
    const { t, epoch } = await opened();
    const events = [activityEvent(1), activityEvent(3, { description: "b" }), activityEvent(2, { description: "a" })];
    expect(await applyEvents(t, epoch, ...events)).toEqual(["applied", "applied", "stale"]);
    expect(await theOnly(t, "activities")).toMatchObject({ description: "b" });
    expect(await applyEvents(t, epoch, deleteEvent(4, KEY), activityEvent(5))).toEqual(["deleted", "applied"]);
    expect(await theOnly(t, "activities")).toMatchObject({ version: { epoch, number: 5 } });
  });
});

describe("what is stale", () => {
  test.each([
    ["the same number", 5],
    ["a lower number", 4],
  ])("%s changes nothing", async (_what, number) => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(5), statusEvent(5));
    const before = [await theOnly(t, "activities"), await theOnly(t, "userStatus")];
    const late = [
      activityEvent(number, { description: "ghost" }),
      deleteEvent(number, KEY),
      statusEvent(number, { nextDue: 1 }),
      deleteEvent(number, `status:${USER}`),
    ];
    expect(await applyEvents(t, epoch, ...late)).toEqual(["stale", "stale", "stale", "stale"]);
    expect([await theOnly(t, "activities"), await theOnly(t, "userStatus")]).toEqual(before);
  });

  test("a lower number of a higher epoch is not", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(100));
    const next = await openShard(t);
    expect(await applyEvents(t, next, activityEvent(1, { description: "b" }))).toEqual(["applied"]);
    expect(await theOnly(t, "activities")).toMatchObject({ description: "b", version: { epoch: next, number: 1 } });
  });

  test("a higher number of a lower epoch is, where a key has moved to another shard", async () => {
    const { t, epoch } = await opened();
    const other = await openShard(t, "other");
    await t.mutation(internal.cdc.apply, { shard: "other", epoch: other, events: [activityEvent(1)] });
    expect(await applyEvents(t, epoch, activityEvent(9, { description: "zombie" }))).toEqual(["stale"]);
  });
});

describe("equal content", () => {
  test("writes nothing, not even the version", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1, { metadata: { a: 1 } }), statusEvent(1, { alertLevel: null }));
    const before = [await theOnly(t, "activities"), await theOnly(t, "userStatus")];
    const same = [activityEvent(2, { metadata: { a: 1 } }), statusEvent(2, { alertLevel: null })];
    expect(await applyEvents(t, epoch, ...same)).toEqual(["unchanged", "unchanged"]);
    expect([await theOnly(t, "activities"), await theOnly(t, "userStatus")]).toEqual(before);
  });

  const deep = { list: [1, { x: null, y: "é" }], big: 12n, nested: { b: true, a: Number.NaN } };
  test.each<[string, unknown, unknown]>([
    ["objects with their keys in another order", { a: 1, b: { c: 2, d: 3 } }, { b: { d: 3, c: 2 }, a: 1 }],
    ["deep values", deep, structuredClone(deep)],
    ["two NaN", Number.NaN, Number.NaN],
  ])("is: %s", async (_what, stored, sent) => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1, { metadata: stored }));
    expect(await applyEvents(t, epoch, activityEvent(2, { metadata: sent }))).toEqual(["unchanged"]);
  });

  test.each<[string, unknown, unknown]>([
    ["0 and -0", 0, -0],
    ["1 and the integer 1", 1, 1n],
    ["1 and true", 1, true],
    ["1 and its text", 1, "1"],
    ["null and an empty object", null, {}],
    ["an object and a list", {}, []],
    ["null in a field and no field", { a: null }, {}],
    ["a list in another order", [1, 2], [2, 1]],
    ["a longer list", [1], [1, 1]],
    ["other keys with the same values", { a: 1 }, { b: 1 }],
    ["a change deep inside", { a: [{ b: 1 }] }, { a: [{ b: 2 }] }],
  ])("is not: %s", async (_what, stored, sent) => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1, { metadata: stored }));
    expect(await applyEvents(t, epoch, activityEvent(2, { metadata: sent }))).toEqual(["applied"]);
    expect((await theOnly(t, "activities")).metadata).toStrictEqual(sent);
  });

  test("is not: metadata of null and none", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1, { metadata: null }));
    expect(await applyEvents(t, epoch, activityEvent(2))).toEqual(["applied"]);
    expect(await theOnly(t, "activities")).not.toHaveProperty("metadata");
  });
});

describe("deleting", () => {
  test.each([
    ["an activity", activityEvent(1), "activities"],
    ["a status", statusEvent(1), "userStatus"],
  ] as const)("%s leaves a tombstone with the version", async (_what, event, table) => {
    const { t, epoch } = await opened();
    const before = Date.now();
    await applyEvents(t, epoch, event);
    expect(await applyEvents(t, epoch, deleteEvent(2, event.key))).toEqual(["deleted"]);
    expect(await everything(t, table)).toEqual([]);
    const tombstone = await theOnly(t, "cdcTombstones");
    expect(tombstone).toMatchObject({ key: event.key, version: { epoch, number: 2 } });
    expect(tombstone.at).toBeGreaterThanOrEqual(before);
    expect(tombstone.at).toBeLessThanOrEqual(Date.now());
  });

  test("what is not there is unchanged, and leaves nothing", async () => {
    const { t, epoch } = await opened();
    expect(await applyEvents(t, epoch, deleteEvent(1, KEY), deleteEvent(2, "status:u1"))).toEqual([
      "unchanged",
      "unchanged",
    ]);
    expect(await everything(t, "cdcTombstones")).toEqual([]);
  });

  test("again is unchanged, and leaves the tombstone as it is", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1), deleteEvent(2, KEY));
    const tombstone = await theOnly(t, "cdcTombstones");
    expect(await applyEvents(t, epoch, deleteEvent(3, KEY))).toEqual(["unchanged"]);
    expect(await theOnly(t, "cdcTombstones")).toEqual(tombstone);
  });

  test.each([
    ["an activity", activityEvent, KEY, "activities"],
    ["a status", statusEvent, "status:u1", "userStatus"],
  ] as const)("keeps out the late ghost of %s, and lets a later one in", async (_what, event, key, table) => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, event(1), deleteEvent(5, key));
    expect(await applyEvents(t, epoch, event(4), event(5))).toEqual(["stale", "stale"]);
    expect(await everything(t, table)).toEqual([]);
    expect(await applyEvents(t, epoch, event(6))).toEqual(["applied"]);
    expect(await theOnly(t, table)).toMatchObject({ version: { epoch, number: 6 } });
    expect(await everything(t, "cdcTombstones")).toEqual([]);
  });

  test("keeps a ghost out of a status that the application wrote since", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, statusEvent(1, { nextDue: 1 }), deleteEvent(2, "status:u1"));
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, lastCheckIn: 7 });
    expect(await applyEvents(t, epoch, statusEvent(1, { nextDue: 1 }))).toEqual(["stale"]);
    expect(await theOnly(t, "userStatus")).toMatchObject({ lastCheckIn: 7 });
    expect(await applyEvents(t, epoch, deleteEvent(3, "status:u1"))).toEqual(["deleted"]);
    expect(await theOnly(t, "cdcTombstones")).toMatchObject({ version: { epoch, number: 3 } });
  });

  test("the activity of one mirror leaves the same key of another alone", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1), activityEvent(2, {}, "alerts:c1"));
    expect(await applyEvents(t, epoch, deleteEvent(3, KEY))).toEqual(["deleted"]);
    expect(await theOnly(t, "activities")).toMatchObject({ key: "alerts:c1" });
  });
});

describe("the fence", () => {
  async function fenced(t: Deployment, epoch: number, shard = SHARD) {
    const events = [activityEvent(1), statusEvent(2), deleteEvent(3, "check-ins:other")];
    const answer = await t.mutation(internal.cdc.apply, { shard, epoch, events });
    expect(await t.mutation(internal.cdc.apply, { shard, epoch, events: [] })).toEqual(answer);
    expect(await everything(t, "activities")).toEqual([]);
    expect(await everything(t, "userStatus")).toEqual([]);
    return answer;
  }

  test("refuses an older epoch whole", async () => {
    const { t, epoch } = await opened();
    const next = await openShard(t);
    expect(await fenced(t, epoch)).toEqual({ outcome: "fenced", epoch: next });
  });

  test.each([1, 0.5, Number.NaN, Number.POSITIVE_INFINITY])("refuses an epoch that is %d above whole", async (more) => {
    const { t, epoch } = await opened();
    expect(await fenced(t, epoch + more)).toEqual({ outcome: "fenced", epoch });
  });

  test("refuses a shard that was never opened, and another shard's epoch", async () => {
    const { t, epoch } = await opened();
    expect(await fenced(t, epoch, "never")).toEqual({ outcome: "fenced", epoch: null });
    const other = await openShard(t, "other");
    expect(await fenced(t, other)).toEqual({ outcome: "fenced", epoch });
  });

  test("leaves a shard alone when another one is opened", async () => {
    const { t, epoch } = await opened();
    await openShard(t, "other");
    expect(await applyEvents(t, epoch, activityEvent(1))).toEqual(["applied"]);
  });

  test("lets the empty probe of the right epoch pass", async () => {
    const { t, epoch } = await opened();
    expect(await applyEvents(t, epoch)).toEqual([]);
  });
});

describe("rejections", () => {
  const types = 'type must be one of "check-in", "alert", "conversation"';
  const activityFields = "userId, type, description, timestamp, metadata";
  test.each<[string, Record<string, unknown>, string]>([
    ["an unknown type", { type: "secret" }, types],
    ["a type that is null", { type: null }, types],
    ["a timestamp that is text", { timestamp: "secret" }, "timestamp must be a finite number"],
    ["a timestamp that is an integer of 64 bits", { timestamp: 1n }, "timestamp must be a finite number"],
    ["a timestamp that is null", { timestamp: null }, "timestamp must be a finite number"],
    ["a timestamp that is NaN", { timestamp: Number.NaN }, "timestamp must be a finite number"],
    ["a timestamp without end", { timestamp: Number.POSITIVE_INFINITY }, "timestamp must be a finite number"],
    ["a user that is null", { userId: null }, "userId must be a string"],
    ["a description that is a number", { description: 1 }, "description must be a string"],
    ["a field that no activity has", { secret: 1 }, `the document may have these fields only: ${activityFields}`],
  ])("an activity with %s", async (_what, wrong, reason) => {
    const { t, epoch } = await opened();
    expect(await applyEvents(t, epoch, activityEvent(1, wrong))).toEqual([{ rejected: reason }]);
    expect(await everything(t, "activities")).toEqual([]);
  });

  const statusFields = "userId, lastCheckIn, nextDue, alertLevel, alertTriggeredAt";
  test.each<[string, Record<string, unknown>, string]>([
    ["an unknown level", { alertLevel: "secret" }, 'alertLevel must be one of "L1", "L2", "L3", "L4", null'],
    ["a time that is null", { lastCheckIn: null }, "lastCheckIn must be a finite number"],
    ["a time that is text", { nextDue: "secret" }, "nextDue must be a finite number"],
    ["a time that is NaN", { alertTriggeredAt: Number.NaN }, "alertTriggeredAt must be a finite number"],
    ["a field that no status has", { type: "secret" }, `the document may have these fields only: ${statusFields}`],
    ["another user than its key's", { userId: "secret" }, "userId must be the part of the key behind the colon"],
  ])("a status with %s", async (_what, wrong, reason) => {
    const { t, epoch } = await opened();
    expect(await applyEvents(t, epoch, statusEvent(1, wrong))).toEqual([{ rejected: reason }]);
    expect(await everything(t, "userStatus")).toEqual([]);
  });

  test.each(["userId", "type", "description", "timestamp"])("an activity without its %s", async (field) => {
    const { t, epoch } = await opened();
    const event = activityEvent(1);
    const document = Object.fromEntries(Object.entries(event.document).filter(([name]) => name !== field));
    const events = [{ ...event, document }];
    expect(await t.mutation(internal.cdc.apply, { shard: SHARD, epoch, events })).toEqual({
      outcome: "applied",
      verdicts: [{ rejected: `${field} is missing` }],
    });
  });

  test.each<[string, unknown]>([
    ["text", "secret"],
    ["a number", 1],
    ["a list", []],
  ])("a document that is %s", async (_what, document) => {
    const { t, epoch } = await opened();
    const events = [{ ...activityEvent(1), document }];
    const answer = await t.mutation(internal.cdc.apply, { shard: SHARD, epoch, events });
    expect(answer).toEqual({ outcome: "applied", verdicts: [{ rejected: "the document must be an object" }] });
  });

  test.each([0.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53])("the number %d", async (number) => {
    const { t, epoch } = await opened();
    const reason = "the number must be an integer";
    const verdicts = await applyEvents(t, epoch, activityEvent(number), statusEvent(number), deleteEvent(number, KEY));
    expect(verdicts).toEqual([{ rejected: reason }, { rejected: reason }, { rejected: reason }]);
  });

  test.each(["", "c1", ":c1", "app:c1"])("the key %j", async (key) => {
    const { t, epoch } = await opened();
    await t.mutation(internal.activities.addActivity, {
      ...activityEvent(1).document,
      type: "alert",
      idempotencyKey: "c1",
    });
    const reason = 'the key must be "mirror:key", and no mirror may be called "app"';
    const verdicts = await applyEvents(t, epoch, activityEvent(1, {}, key), deleteEvent(2, key));
    expect(verdicts).toEqual([{ rejected: reason }, { rejected: reason }]);
    expect(await everything(t, "activities")).toHaveLength(1);
  });

  test("leave the document and the rest of the batch as they are", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1));
    const before = await theOnly(t, "activities");
    const verdicts = await applyEvents(
      t,
      epoch,
      activityEvent(2, { type: "x" }),
      statusEvent(3),
      deleteEvent(4, "m:gone"),
    );
    expect(verdicts).toEqual([{ rejected: types }, "applied", "unchanged"]);
    expect(await theOnly(t, "activities")).toEqual(before);
    expect(await applyEvents(t, epoch, activityEvent(5, { description: "good" }))).toEqual(["applied"]);
  });
});

describe("documents that somebody changed by hand", () => {
  test("and removed come back with the next event", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1), statusEvent(1));
    const [activity, status] = [await theOnly(t, "activities"), await theOnly(t, "userStatus")];
    await t.run(async (ctx) => {
      await ctx.db.delete("activities", activity._id);
      await ctx.db.delete("userStatus", status._id);
    });
    expect(await applyEvents(t, epoch, activityEvent(2), statusEvent(2))).toEqual(["applied", "applied"]);
    expect(await theOnly(t, "activities")).toMatchObject({ version: { epoch, number: 2 } });
    expect(await theOnly(t, "userStatus")).toMatchObject({ version: { epoch, number: 2 } });
  });

  test("are put right by the next event, though the worker's content is what it was", async () => {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(1));
    const { _id } = await theOnly(t, "activities");
    await t.run((ctx) => ctx.db.patch("activities", _id, { description: "edited", metadata: 1 }));
    expect(await applyEvents(t, epoch, activityEvent(2))).toEqual(["applied"]);
    const right = { ...SYSTEM, ...activityEvent(2).document, key: KEY, version: { epoch, number: 2 } };
    expect(await theOnly(t, "activities")).toEqual(right);
  });

  test("and lost their version take the worker's", async () => {
    const { t, epoch } = await opened();
    await t.run((ctx) =>
      ctx.db.insert("activities", { userId: USER, type: "alert", description: "", timestamp: 0, key: KEY }),
    );
    expect(await applyEvents(t, epoch, activityEvent(0))).toEqual(["applied"]);
    expect(await theOnly(t, "activities")).toMatchObject({ version: { epoch, number: 0 } });
  });

  async function withDoubles() {
    const { t, epoch } = await opened();
    await applyEvents(t, epoch, activityEvent(2), statusEvent(2));
    await t.run(async (ctx) => {
      for (const { _id, _creationTime, ...copy } of await ctx.db.query("activities").collect()) {
        await ctx.db.insert("activities", copy);
      }
      for (const { _id, _creationTime, ...copy } of await ctx.db.query("userStatus").collect()) {
        await ctx.db.insert("userStatus", { ...copy, version: { epoch, number: 7 } });
      }
    });
    return { t, epoch };
  }

  test("and doubled are one again", async () => {
    const { t, epoch } = await withDoubles();
    expect(await applyEvents(t, epoch, activityEvent(8), statusEvent(8))).toEqual(["applied", "applied"]);
    expect(await theOnly(t, "activities")).toMatchObject({ version: { epoch, number: 8 } });
    expect(await theOnly(t, "userStatus")).toMatchObject({ version: { epoch, number: 8 } });
  });

  test("and doubled go both when the row goes, unless one is newer", async () => {
    const { t, epoch } = await withDoubles();
    expect(await applyEvents(t, epoch, deleteEvent(6, KEY), deleteEvent(6, "status:u1"))).toEqual(["deleted", "stale"]);
    expect(await everything(t, "activities")).toEqual([]);
    expect(await everything(t, "userStatus")).toHaveLength(2);
  });
});

test("a batch of 500 has a verdict for each event, in order", async () => {
  const { t, epoch } = await opened();
  const setUp = Array.from({ length: 100 }, (_, i) => activityEvent(i, {}, `check-ins:${i}`));
  await applyEvents(t, epoch, ...setUp);
  const kinds: [string, (i: number) => AnyEvent][] = [
    ["applied", (i) => activityEvent(1000 + i, { description: "changed" }, `check-ins:${i}`)],
    ["unchanged", (i) => activityEvent(1000 + i, {}, `check-ins:${i}`)],
    ["deleted", (i) => deleteEvent(1000 + i, `check-ins:${i}`)],
    ["stale", (i) => activityEvent(-1, { description: "ghost" }, `check-ins:${i}`)],
    ["rejected", (i) => activityEvent(1000 + i, { type: "x" }, `check-ins:${i}`)],
  ];
  const batch = setUp.flatMap((_, i) => {
    const [expected, event] = kinds[i % kinds.length] ?? ["", deleteEvent];
    const user = `u${i}`;
    return [
      { expected, event: event(i) },
      { expected: "applied", event: statusEvent(2000, { nextDue: i }, user) },
      { expected: "unchanged", event: statusEvent(2001, { nextDue: i }, user) },
      { expected: "deleted", event: deleteEvent(2002, `status:${user}`) },
      { expected: "applied", event: activityEvent(3000, {}, `alerts:${i}`) },
    ];
  });
  expect(batch).toHaveLength(500);
  const verdicts = await applyEvents(t, epoch, ...batch.map(({ event }) => event));
  const names = verdicts.map((verdict) => (typeof verdict === "string" ? verdict : "rejected"));
  expect(names).toEqual(batch.map(({ expected }) => expected));
  expect(await everything(t, "activities")).toHaveLength(180);
  expect(await everything(t, "userStatus")).toEqual([]);
});

test("a batch reads its own shard's row and no counter, so shards do not conflict", async () => {
  const { t, epoch } = await opened();
  await t.run(async (ctx) => {
    for (const counter of await ctx.db.query("cdcCounter").collect()) await ctx.db.delete("cdcCounter", counter._id);
  });
  expect(await applyEvents(t, epoch, activityEvent(1))).toEqual(["applied"]);
});
