import { internalMutationGeneric, internalQueryGeneric } from "convex/server";
import type { GenericId } from "convex/values";
import { v } from "convex/values";

// Copied beside a copy of convex/ for tests (servers.py), and never deployed. Generic functions, since the generated types are
// where it is copied to, not here.

const MIRRORED = ["activities", "userStatus"];

/** Every document of the mirrored tables, and every tombstone. Test data is small. */
export const dump = internalQueryGeneric({
  args: {},
  returns: v.record(v.string(), v.array(v.any())),
  handler: async (ctx) =>
    Object.fromEntries(
      await Promise.all(
        [...MIRRORED, "cdcTombstones"].map(async (table) => [table, await ctx.db.query(table).collect()] as const),
      ),
    ),
});

/** Makes the deployment what it was before anybody used it. */
export const wipe = internalMutationGeneric({
  args: {},
  returns: v.null(),
  handler: async (ctx) => {
    for (const table of [...MIRRORED, "cdcCounter", "cdcShards", "cdcTombstones"]) {
      for (const document of await ctx.db.query(table).collect())
        await ctx.db.delete(document._id as GenericId<string>);
    }
    return null;
  },
});
