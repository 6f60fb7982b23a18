import { afterEach, describe, expect, test, vi } from "vitest";
import { api, internal } from "../../convex/_generated/api";
import {
  applyEvents,
  type Deployment,
  newDeployment,
  openShard,
  refusal,
  statusEvent,
  theOnly,
  USER,
} from "./deployment";

afterEach(() => {
  vi.unstubAllEnvs();
});

function statusOf(t: Deployment, userId = USER) {
  return t.withIdentity({ subject: userId }).query(api.alerts.getUserStatus, { userId });
}

const IDENTITY = { _id: expect.any(String), _creationTime: expect.any(Number), userId: USER };

describe("getUserStatus", () => {
  test("is null for a user without one", async () => {
    expect(await statusOf(newDeployment())).toBeNull();
  });

  test("answers with the user's document, without its version", async () => {
    const t = newDeployment();
    const fields = { lastCheckIn: 1, nextDue: 2, alertLevel: "L3", alertTriggeredAt: 3 };
    await applyEvents(t, await openShard(t), statusEvent(1, fields), statusEvent(2, {}, "u2"));
    expect(await statusOf(t)).toEqual({ ...IDENTITY, ...fields });
  });

  test("keeps an alert level that is null, and lacks one that is absent", async () => {
    const t = newDeployment();
    const epoch = await openShard(t);
    await applyEvents(t, epoch, statusEvent(1, { alertLevel: null }));
    expect(await statusOf(t)).toEqual({ ...IDENTITY, alertLevel: null });
    await applyEvents(t, epoch, statusEvent(2, {}));
    expect(await statusOf(t)).toEqual(IDENTITY);
  });

  test("answers a user's own identity only", async () => {
    const t = newDeployment();
    const message = await refusal(t.query(api.alerts.getUserStatus, { userId: USER }), "unauthenticated");
    expect(message).toContain("ALLOW_PUBLIC_READS=true");
    const other = t.withIdentity({ subject: "u2" }).query(api.alerts.getUserStatus, { userId: USER });
    expect(await refusal(other, "forbidden")).toContain("ALLOW_PUBLIC_READS=true");
  });

  test("answers anyone where reads are public", async () => {
    vi.stubEnv("ALLOW_PUBLIC_READS", "true");
    expect(await newDeployment().query(api.alerts.getUserStatus, { userId: USER })).toBeNull();
  });
});

describe("updateUserStatus", () => {
  test("creates the status, below every version of the worker's", async () => {
    const t = newDeployment();
    expect(
      await t.mutation(internal.alerts.updateUserStatus, { userId: USER, lastCheckIn: 7, nextDue: null }),
    ).toBeNull();
    const created = { ...IDENTITY, lastCheckIn: 7, version: { epoch: 0, number: 0, overwritten: true } };
    expect(await theOnly(t, "userStatus")).toEqual(created);
  });

  test("sets what is given, clears what is null, leaves what is omitted", async () => {
    const t = newDeployment();
    const before = { userId: USER, lastCheckIn: 1, nextDue: 2, alertLevel: "L1", alertTriggeredAt: 3 } as const;
    await t.mutation(internal.alerts.updateUserStatus, before);
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, nextDue: 20, alertLevel: null });
    expect(await statusOf(t)).toEqual({ ...IDENTITY, lastCheckIn: 1, nextDue: 20, alertTriggeredAt: 3 });
    const clear = { userId: USER, lastCheckIn: null, nextDue: null, alertTriggeredAt: null };
    await t.mutation(internal.alerts.updateUserStatus, clear);
    expect(await statusOf(t)).toEqual(IDENTITY);
  });

  test("leaves the worker's version and a stored null alone", async () => {
    const t = newDeployment();
    const epoch = await openShard(t);
    await applyEvents(t, epoch, statusEvent(4, { alertLevel: null }));
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, nextDue: 5 });
    const changed = { ...IDENTITY, alertLevel: null, nextDue: 5, version: { epoch, number: 4, overwritten: true } };
    expect(await theOnly(t, "userStatus")).toEqual(changed);
  });

  test("is overwritten by the worker", async () => {
    const t = newDeployment();
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, lastCheckIn: 7 });
    const epoch = await openShard(t);
    expect(await applyEvents(t, epoch, statusEvent(0, { nextDue: 9 }))).toEqual(["applied"]);
    expect(await theOnly(t, "userStatus")).toEqual({ ...IDENTITY, nextDue: 9, version: { epoch, number: 0 } });
  });

  test("hides no version from a late copy of what the worker sent before", async () => {
    const t = newDeployment();
    const epoch = await openShard(t);
    await applyEvents(t, epoch, statusEvent(5, { nextDue: 1 }));
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, nextDue: 2 });
    await applyEvents(t, epoch, statusEvent(6, { nextDue: 2 }));
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, nextDue: 1 });
    await applyEvents(t, epoch, statusEvent(7, { nextDue: 1 }));
    expect(await applyEvents(t, epoch, statusEvent(6, { nextDue: 2 }))).toEqual(["stale"]);
    expect(await statusOf(t)).toEqual({ ...IDENTITY, nextDue: 1 });
    expect(await applyEvents(t, epoch, statusEvent(8, { nextDue: 1 }))).toEqual(["unchanged"]);
  });

  test("touches no other user's", async () => {
    const t = newDeployment();
    await t.mutation(internal.alerts.updateUserStatus, { userId: USER, lastCheckIn: 7 });
    await t.mutation(internal.alerts.updateUserStatus, { userId: "u2", lastCheckIn: 8 });
    expect(await statusOf(t)).toMatchObject({ lastCheckIn: 7 });
    expect(await statusOf(t, "u2")).toMatchObject({ lastCheckIn: 8 });
  });

  test("refuses a level that the schema does not know, and a time that is not finite", async () => {
    const t = newDeployment();
    const wrong = { userId: USER, alertLevel: "L9" as "L4" };
    await expect(t.mutation(internal.alerts.updateUserStatus, wrong)).rejects.toThrow("L9");
    const call = t.mutation(internal.alerts.updateUserStatus, { userId: USER, nextDue: Number.NaN });
    expect(await refusal(call, "invalid_argument")).toBe("nextDue must be a finite number.");
  });
});
