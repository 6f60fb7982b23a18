import { ConvexError, v } from "convex/values";
import { internalMutation, query } from "./_generated/server";
import { requireIntegerWithin } from "./integerWithin";
import { judgeContent } from "./judgeContent";
import { requireReadAccess } from "./readAccess";
import { activityContent } from "./schema";
import { whatFits } from "./whatFits";

const MOST_RECENT_ACTIVITIES = 100; // What a page can show; a query that is watched live should stay cheap to rerun.

/**
 * The newest activities of a user, newest first, 20 unless told otherwise; fewer where they have more than 8 MiB
 * together.
 *
 * @throws ConvexError `unauthenticated` or `forbidden` (readAccess.ts), `invalid_argument` for a limit out of bounds.
 */
export const getRecentActivities = query({
  args: { userId: v.string(), limit: v.optional(v.number()) },
  returns: v.array(v.object({ _id: v.id("activities"), _creationTime: v.number(), ...activityContent })),
  handler: async (ctx, { userId, limit = 20 }) => {
    await requireReadAccess(ctx, userId);
    requireIntegerWithin("limit", limit, 1, MOST_RECENT_ACTIVITIES);
    const newest = ctx.db
      .query("activities")
      .withIndex("by_user_timestamp", (q) => q.eq("userId", userId))
      .order("desc");
    const recent = [];
    for await (const { key: _key, version: _version, ...shown } of whatFits(newest, limit)) recent.push(shown);
    return recent;
  },
});

/**
 * Adds an activity that has no row in Postgres, and returns its id.
 *
 * With an `idempotencyKey` a repeated call returns the id of the first one and changes nothing, so a caller that does
 * not know whether its request arrived just repeats it. The key is one for all users. Internal: only a deploy key
 * writes.
 *
 * @throws ConvexError `invalid_argument` for a timestamp that is not finite, or a key that another user's activity has.
 */
export const addActivity = internalMutation({
  args: { ...activityContent, idempotencyKey: v.optional(v.string()) },
  returns: v.id("activities"),
  handler: async (ctx, { idempotencyKey, ...activity }) => {
    const judgement = judgeContent(activityContent, activity);
    if ("rejected" in judgement) {
      throw new ConvexError({ code: "invalid_argument", message: `${judgement.rejected}.` });
    }
    if (idempotencyKey === undefined) return ctx.db.insert("activities", activity);
    // No mirror may be called "app", so these keys never meet the worker's.
    const key = `app:${idempotencyKey}`;
    const first = await ctx.db
      .query("activities")
      .withIndex("by_key", (q) => q.eq("key", key))
      .first();
    if (first === null) return ctx.db.insert("activities", { ...activity, key });
    if (first.userId !== activity.userId) {
      // The first one's id would say of this user's that it is there.
      throw new ConvexError({ code: "invalid_argument", message: "Another user's activity has this idempotencyKey." });
    }
    return first._id;
  },
});
