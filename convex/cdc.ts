import type { Infer, Value } from "convex/values";
import { v } from "convex/values";
import { internal } from "./_generated/api";
import type { Doc } from "./_generated/dataModel";
import type { MutationCtx } from "./_generated/server";
import { internalMutation, internalQuery } from "./_generated/server";
import { requireIntegerWithin } from "./integerWithin";
import { isSame } from "./isSame";
import { activityTable, type MirrorTable, statusTable } from "./mirrorTables";
import { UNVERSIONED, type Version } from "./schema";
import { whatFits } from "./whatFits";

// What the worker and Convex say to each other: docs/protocol.md.

// Each key read is a whole document read, of which a query may read 32,000.
const MOST_KEYS = 1000;

// As many as there can be workers; all are looked at when their number changes.
const MOST_SHARDS = 64;

// A tombstone is there for a ghost: a request that its sender gave up, and that arrives after the delete. The server
// cuts a request at 300 s, so no ghost is older; a day is that many times over, and outlives a clock that was set.
const TOMBSTONE_MS = 24 * 60 * 60 * 1000;

// A delete costs a read and a write of one small document; 500 stay far below every limit of a mutation.
const PRUNE_BATCH = 500;

const target = v.union(v.literal("activity"), v.literal("status"));

const event = v.object({
  key: v.string(),
  number: v.number(),
  target,
  // Judged key by key in the handler. A validator here would fail the whole batch for one bad document.
  document: v.any(),
});
type Event = { key: string; number: number; target: Infer<typeof target>; document: unknown };

const verdict = v.union(
  v.literal("applied"),
  v.literal("unchanged"),
  v.literal("deleted"),
  v.literal("stale"),
  v.object({ rejected: v.string() }),
);
type Verdict = Infer<typeof verdict>;

/**
 * Opens a shard for a reader: hands out the epoch that alone may write to the shard from now on.
 *
 * A repeated call takes the next epoch, and says the same of what was before. A late one fences the reader, which opens
 * again. `reader` is fresh for each reader; a deployment that has no identity yet makes its own of the first one.
 *
 * Epoch and identity have the time in them, so that a late call gives out neither a second time after the deployment was
 * emptied or set back.
 *
 * When the number of shards has changed, all shards are shut: a key may be in another one now, and a late request of its
 * old shard must not come after one of its new shard.
 *
 * @throws ConvexError `invalid_argument` for an `atLeast` that is no epoch, or for less than one shard.
 */
export const open = internalMutation({
  args: { shard: v.string(), shards: v.number(), reader: v.string(), atLeast: v.number(), saves: v.number() },
  returns: v.object({
    deployment: v.string(),
    epoch: v.number(),
    previous: v.union(v.number(), v.null()),
    previousSaves: v.number(),
  }),
  handler: async (ctx, { shard, shards, reader, atLeast, saves }) => {
    requireIntegerWithin("atLeast", atLeast, 0, Number.MAX_SAFE_INTEGER - 1);
    requireIntegerWithin("shards", shards, 1, MOST_SHARDS);
    const counter = await ctx.db.query("cdcCounter").unique();
    const epoch = Math.max(counter?.epoch ?? 0, atLeast, Date.now()) + 1;
    const deployment = counter?.deployment ?? `${reader}@${Date.now()}`;
    if (counter === null) await ctx.db.insert("cdcCounter", { deployment, epoch, shards });
    else await ctx.db.patch("cdcCounter", counter._id, { epoch, shards });
    if ((counter?.shards ?? 1) !== shards) await shutShards(ctx);

    const opened = await findShard(ctx, shard);
    const again = opened?.reader === reader;
    const previous = again ? opened.previous : (opened?.epoch ?? null);
    const previousSaves = (again ? opened.previousSaves : opened?.saves) ?? 0;
    const row = { shard, epoch, reader, previous, saves, previousSaves };
    if (opened === null) await ctx.db.insert("cdcShards", row);
    else await ctx.db.replace("cdcShards", opened._id, row);
    return { deployment, epoch, previous, previousSaves };
  },
});

/**
 * Notes how often the shard's checkpoint in Postgres was saved, if `epoch` is the shard's, and says what was noted
 * before; null if another reader has the shard.
 *
 * `open` tells the next reader, which finds out by it that Postgres was set back to a backup from within this epoch. By
 * the answer this reader finds out the same of the deployment.
 */
export const noteSaves = internalMutation({
  args: { shard: v.string(), epoch: v.number(), saves: v.number() },
  returns: v.union(v.number(), v.null()),
  handler: async (ctx, { shard, epoch, saves }): Promise<number | null> => {
    const opened = await findShard(ctx, shard);
    if (opened === null || opened.epoch !== epoch) return null;
    await ctx.db.patch("cdcShards", opened._id, { saves });
    return opened.saves ?? 0;
  },
});

/**
 * Brings the documents of a batch to the state that the reader saw, and says per event what became of it.
 *
 * Nothing at all is done under an epoch other than the shard's: an older one is a reader that was replaced, a newer
 * one was handed out before this deployment was restored from a backup. The reader opens again.
 */
export const apply = internalMutation({
  args: { shard: v.string(), epoch: v.number(), events: v.array(event) },
  returns: v.union(
    v.object({ outcome: v.literal("applied"), verdicts: v.array(verdict) }),
    v.object({ outcome: v.literal("fenced"), epoch: v.union(v.number(), v.null()) }),
  ),
  handler: async (ctx, { shard, epoch, events }) => {
    const opened = await findShard(ctx, shard);
    if (opened?.epoch !== epoch) return { outcome: "fenced" as const, epoch: opened?.epoch ?? null };

    const verdicts = new Array<Verdict>(events.length);
    // At once for different documents, since each look-up is a round trip; in order for one and the same.
    await Promise.all(
      groupBySlot(events).map(async (group) => {
        for (const [place, event] of group) verdicts[place] = await applyEvent(ctx, epoch, event);
      }),
    );
    return { outcome: "applied" as const, verdicts };
  },
});

function groupBySlot(events: Event[]): [place: number, event: Event][][] {
  const groups = new Map<string, [number, Event][]>();
  for (const [place, event] of events.entries()) {
    const slot = event.target === "activity" ? activityTable.slot(event.key) : statusTable.slot(event.key);
    const group = groups.get(slot);
    if (group === undefined) groups.set(slot, [[place, event]]);
    else group.push([place, event]);
  }
  return [...groups.values()];
}

async function applyEvent(ctx: MutationCtx, epoch: number, event: Event): Promise<Verdict> {
  if (!/^(?!app:)[^:]+:/.test(event.key)) {
    return { rejected: 'the key must be "mirror:key", and no mirror may be called "app"' };
  }
  if (!Number.isSafeInteger(event.number)) return { rejected: "the number must be an integer" };
  return event.target === "activity"
    ? applyTo(activityTable, ctx, epoch, event)
    : applyTo(statusTable, ctx, epoch, event);
}

/** One look-up and one write if the document stands. A tombstone is looked up only if none of the worker's does. */
async function applyTo<Content extends Value>(
  table: MirrorTable<Content>,
  ctx: MutationCtx,
  epoch: number,
  { key, number, document }: Event,
): Promise<Verdict> {
  const judgement = document === null ? null : table.judge(key, document);
  if (judgement !== null && "rejected" in judgement) return judgement;

  const version = { epoch, number };
  const standing = await table.find(ctx, key);
  // A status that the application wrote after the worker deleted it has no version: there the tombstone still counts.
  const known = standing.some((stored) => isAbove(stored.version, UNVERSIONED));
  const tombstone = known ? null : await findTombstone(ctx, key);
  const versions = [...standing, ...(tombstone === null ? [] : [tombstone])].map((each) => each.version);
  if (!versions.every((older) => isAbove(version, older))) return "stale";

  const [stored, ...doubles] = standing;
  for (const double of doubles) await double.remove();
  if (judgement === null) {
    if (stored === undefined) return "unchanged";
    await stored.remove();
    await bury(ctx, tombstone, key, version);
    return "deleted";
  }
  const { content } = judgement;
  // What the application wrote takes the version even if it is equal: a late copy of this event must find it.
  const untouched = stored?.version.overwritten !== true && doubles.length === 0;
  if (untouched && stored !== undefined && isSame(stored.content, content)) {
    return "unchanged"; // Not even the version: a write would wake everybody who watches the document.
  }
  if (tombstone !== null) await ctx.db.delete("cdcTombstones", tombstone._id);
  if (stored === undefined) await table.insert(ctx, key, content, version);
  else await stored.replace(content, version);
  return "applied";
}

function isAbove(version: Version, other: Version): boolean {
  return version.epoch > other.epoch || (version.epoch === other.epoch && version.number > other.number);
}

function findShard(ctx: MutationCtx, shard: string): Promise<Doc<"cdcShards"> | null> {
  return ctx.db
    .query("cdcShards")
    .withIndex("by_shard", (q) => q.eq("shard", shard))
    .unique();
}

async function shutShards(ctx: MutationCtx): Promise<void> {
  for (const opened of await ctx.db.query("cdcShards").collect()) await ctx.db.delete("cdcShards", opened._id);
}

function findTombstone(ctx: MutationCtx, key: string): Promise<Doc<"cdcTombstones"> | null> {
  return ctx.db
    .query("cdcTombstones")
    .withIndex("by_key", (q) => q.eq("key", key))
    .order("desc")
    .first();
}

async function bury(
  ctx: MutationCtx,
  tombstone: Doc<"cdcTombstones"> | null,
  key: string,
  version: Version,
): Promise<void> {
  const buried = { key, version, at: Date.now() };
  if (tombstone === null) await ctx.db.insert("cdcTombstones", buried);
  else await ctx.db.replace("cdcTombstones", tombstone._id, buried);
}

/**
 * The keys of a mirror's documents in order, the part behind the colon, after `after`: at most `limit`, and fewer where
 * the documents are large. Only an empty answer is the end.
 *
 * For a comparison of Convex with Postgres. A status has no key but its user, and there is one status mirror at most,
 * so all statuses are that mirror's, the ones that `updateUserStatus` wrote too.
 *
 * @throws ConvexError `invalid_argument` for a limit out of bounds.
 */
export const keys = internalQuery({
  args: { mirror: v.string(), target, after: v.union(v.string(), v.null()), limit: v.number() },
  returns: v.array(v.string()),
  handler: async (ctx, { mirror, target, after, limit }) => {
    requireIntegerWithin("limit", limit, 1, MOST_KEYS);
    const found: string[] = [];
    if (target === "status") {
      const statuses = ctx.db
        .query("userStatus")
        .withIndex("by_user", (q) => (after === null ? q : q.gt("userId", after)));
      for await (const status of whatFits(statuses, limit)) found.push(status.userId);
      return found;
    }
    const first = `${mirror}:`;
    const end = `${mirror};`; // The semicolon is the character after the colon.
    const activities = ctx.db
      .query("activities")
      .withIndex("by_key", (q) => (after === null ? q.gte("key", first) : q.gt("key", first + after)).lt("key", end));
    for await (const { key = first } of whatFits(activities, limit)) found.push(key.slice(first.length));
    return found;
  },
});

/**
 * Deletes tombstones that no late request can need any more, in batches that reschedule themselves. Run by crons.ts.
 *
 * `from`: what is buried earlier was deleted just now. For some minutes Convex walks over deleted documents as if they
 * were there, and a batch that began at the first would walk over those of all batches before it.
 */
export const prune = internalMutation({
  args: { from: v.optional(v.number()) },
  returns: v.null(),
  handler: async (ctx, { from = 0 }): Promise<null> => {
    const expired = await ctx.db
      .query("cdcTombstones")
      .withIndex("by_at", (q) => q.gte("at", from).lt("at", Date.now() - TOMBSTONE_MS))
      .take(PRUNE_BATCH);
    for (const tombstone of expired) await ctx.db.delete("cdcTombstones", tombstone._id);
    const last = expired[PRUNE_BATCH - 1];
    if (last !== undefined) await ctx.scheduler.runAfter(0, internal.cdc.prune, { from: last.at });
    return null;
  },
});
