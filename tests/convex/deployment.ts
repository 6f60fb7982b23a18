import { ConvexError } from "convex/values";
import { convexTest, type TestConvex } from "convex-test";
import { expect } from "vitest";
import { internal } from "../../convex/_generated/api";
import type { Doc } from "../../convex/_generated/dataModel";
import schema from "../../convex/schema";

export type Deployment = TestConvex<typeof schema>;

/** A deployment of the real functions with an empty database, and with Convex' limits of a transaction. */
export function newDeployment(): Deployment {
  const modules = import.meta.glob("../../convex/**/*.{ts,js}");
  return convexTest({ schema, modules, transactionLimits: true });
}

export const SHARD = "main";
export const USER = "u1";

/** Opens the shard and returns its epoch. */
export async function openShard(t: Deployment, shard = SHARD): Promise<number> {
  return (await t.mutation(internal.cdc.open, { shard, reader: crypto.randomUUID(), shards: 1, atLeast: 0, saves: 0 }))
    .epoch;
}

/** An activity's event as the worker sends it. */
export function activityEvent(number: number, changes: Record<string, unknown> = {}, key = "check-ins:c1") {
  const document = { userId: USER, type: "check-in", description: "Checked in", timestamp: 1000, ...changes };
  return { key, number, target: "activity" as const, document };
}

/** A status' event as the worker sends it. */
export function statusEvent(number: number, fields: Record<string, unknown> = {}, userId = USER) {
  return { key: `status:${userId}`, number, target: "status" as const, document: { userId, ...fields } };
}

export function deleteEvent(number: number, key = "check-ins:c1") {
  return {
    key,
    number,
    target: key.startsWith("status:") ? ("status" as const) : ("activity" as const),
    document: null,
  };
}

export type AnyEvent = ReturnType<typeof activityEvent | typeof statusEvent | typeof deleteEvent>;

/** Applies a batch that must not be fenced, and returns its verdicts. */
export async function applyEvents(t: Deployment, epoch: number, ...events: AnyEvent[]) {
  const answer = await t.mutation(internal.cdc.apply, { shard: SHARD, epoch, events });
  if (answer.outcome !== "applied") throw new Error(`The batch was fenced by epoch ${answer.epoch}.`);
  return answer.verdicts;
}

const LARGE = "x".repeat(1_000_000);

/** Inserts activities of the user that are nearly as large as a document may be, one of each key. */
export async function insertLarge(t: Deployment, keys: string[]): Promise<void> {
  for (const [timestamp, key] of keys.entries()) {
    const activity = { userId: USER, type: "check-in" as const, description: LARGE, timestamp, key };
    await t.run(async (ctx) => void (await ctx.db.insert("activities", activity)));
  }
}

type Table = "activities" | "userStatus" | "cdcCounter" | "cdcShards" | "cdcTombstones";

/** Every document of a table, bookkeeping and all. */
export function everything<Name extends Table>(t: Deployment, table: Name): Promise<Doc<Name>[]> {
  return t.run<Doc<Name>[]>((ctx) => ctx.db.query(table).collect());
}

/** The only document of a table. */
export async function theOnly<Name extends Table>(t: Deployment, table: Name): Promise<Doc<Name>> {
  const [first, ...others] = await everything(t, table);
  expect(others).toEqual([]);
  if (first === undefined) throw new Error(`The table ${table} is empty.`);
  return first;
}

/** Expects a call to be refused with a ConvexError of this code, and returns its message. */
export async function refusal(call: Promise<unknown>, code: string): Promise<string> {
  const error = await call.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof ConvexError)) throw new Error(`Expected a ConvexError, not ${String(error)}.`);
  // convex-test hands the data over as the JSON that goes over the wire.
  const data = typeof error.data === "string" ? JSON.parse(error.data) : error.data;
  expect(data).toEqual({ code, message: expect.any(String) });
  return data.message;
}
