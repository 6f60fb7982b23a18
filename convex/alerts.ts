import { ConvexError, v } from "convex/values";
import { internalMutation, query } from "./_generated/server";
import { judgeContent } from "./judgeContent";
import { requireReadAccess } from "./readAccess";
import { statusContent, UNVERSIONED } from "./schema";

/**
 * The status of a user, or null if there is none.
 *
 * @throws ConvexError `unauthenticated` or `forbidden` (readAccess.ts).
 */
export const getUserStatus = query({
  args: { userId: v.string() },
  returns: v.union(v.object({ _id: v.id("userStatus"), _creationTime: v.number(), ...statusContent }), v.null()),
  handler: async (ctx, { userId }) => {
    await requireReadAccess(ctx, userId);
    const status = await ctx.db
      .query("userStatus")
      .withIndex("by_user", (q) => q.eq("userId", userId))
      .first();
    if (status === null) return null;
    const { version: _version, ...shown } = status;
    return shown;
  },
});

/**
 * Sets fields of a user's status, for what has no row in Postgres: null clears a field, an omitted one stays.
 *
 * A status that a mirror keeps as well is overwritten by that mirror's next change. Internal: only a deploy key writes.
 *
 * @throws ConvexError `invalid_argument` for a time that is not finite.
 */
export const updateUserStatus = internalMutation({
  args: {
    userId: v.string(),
    lastCheckIn: v.optional(v.union(v.number(), v.null())),
    nextDue: v.optional(v.union(v.number(), v.null())),
    alertLevel: statusContent.alertLevel,
    alertTriggeredAt: v.optional(v.union(v.number(), v.null())),
  },
  returns: v.null(),
  handler: async (ctx, { userId, ...given }) => {
    const fields = withNullsAsUndefined(given);
    const judgement = judgeContent(statusContent, { userId, ...fields });
    if ("rejected" in judgement) {
      throw new ConvexError({ code: "invalid_argument", message: `${judgement.rejected}.` });
    }
    const status = await ctx.db
      .query("userStatus")
      .withIndex("by_user", (q) => q.eq("userId", userId))
      .first();
    const version = { ...(status?.version ?? UNVERSIONED), overwritten: true };
    const id = status?._id ?? (await ctx.db.insert("userStatus", { userId, version }));
    await ctx.db.patch("userStatus", id, { ...fields, version });
    return null;
  },
});

type NullsAsUndefined<Fields> = { [Name in keyof Fields]: Exclude<Fields[Name], null> | undefined };

/** Convex removes a field that is patched with undefined; JSON, in which the arguments arrive, has only null. */
function withNullsAsUndefined<Fields extends object>(fields: Fields): NullsAsUndefined<Fields> {
  const entries = Object.entries(fields).map(([name, value]) => [name, value ?? undefined]);
  return Object.fromEntries(entries) as NullsAsUndefined<Fields>;
}
