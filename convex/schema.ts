import { defineSchema, defineTable } from "convex/server";
import type { Infer } from "convex/values";
import { v } from "convex/values";

/**
 * The place of a document in the worker's order. Convex hands out the epoch (`cdc:open`), the reader of
 * that epoch counts the number. Only a higher version changes a document. `overwritten`: the application has written since.
 */
export const version = v.object({ epoch: v.number(), number: v.number(), overwritten: v.optional(v.boolean()) });
export type Version = Infer<typeof version>;

/** What the worker has never written. Below every version of the worker's, whose epochs start at 1. */
export const UNVERSIONED: Version = { epoch: 0, number: 0 };

/** What an activity says. `cdc:apply` judges the worker's documents by these same validators. */
export const activityContent = {
  userId: v.string(),
  type: v.union(v.literal("check-in"), v.literal("alert"), v.literal("conversation")),
  description: v.string(),
  timestamp: v.number(), // milliseconds since 1970
  metadata: v.optional(v.any()),
};

/** What the status of a user says. A user has one document. Times are milliseconds since 1970. */
export const statusContent = {
  userId: v.string(),
  lastCheckIn: v.optional(v.number()),
  nextDue: v.optional(v.number()),
  alertLevel: v.optional(v.union(v.literal("L1"), v.literal("L2"), v.literal("L3"), v.literal("L4"), v.null())),
  alertTriggeredAt: v.optional(v.number()),
};

export default defineSchema({
  activities: defineTable({
    ...activityContent,
    // "mirror:key" of the worker's, "app:idempotencyKey" of addActivity's; absent if that got no key.
    key: v.optional(v.string()),
    version: v.optional(version),
  })
    .index("by_user_timestamp", ["userId", "timestamp"])
    .index("by_timestamp", ["timestamp"])
    .index("by_key", ["key"]),

  userStatus: defineTable({ ...statusContent, version }).index("by_user", ["userId"]),

  // One document: which deployment this is, the highest epoch handed out, and into how many shards the keys are divided.
  // Only `open` touches it. A document that every batch read would make the batches of all shards conflict.
  cdcCounter: defineTable({ deployment: v.string(), epoch: v.number(), shards: v.optional(v.number()) }),

  // The epoch that may write, per shard. A batch reads the row of its own shard and no other.
  // `saves` is how often the shard's checkpoint in Postgres was saved, as far as the worker has told. `previous` and
  // `previousSaves` are what epoch and saves were before this reader came, however often it opened.
  cdcShards: defineTable({
    shard: v.string(),
    epoch: v.number(),
    reader: v.string(),
    previous: v.union(v.number(), v.null()),
    saves: v.optional(v.number()),
    previousSaves: v.optional(v.number()),
  }).index("by_shard", ["shard"]),

  // What the worker deleted and at which version, so that a late ghost does not bring it back. `at` is the
  // deployment's clock in milliseconds; a cron prunes by it.
  cdcTombstones: defineTable({ key: v.string(), version, at: v.number() })
    .index("by_key", ["key"])
    .index("by_at", ["at"]),
});
