// Small functions, each of which shows one thing that the local Convex has to do. No application is like this.
import {
  actionGeneric as action,
  type DataModelFromSchemaDefinition,
  internalMutationGeneric,
  type MutationBuilder,
  makeFunctionReference,
  mutationGeneric,
  paginationOptsValidator,
  type QueryBuilder,
  queryGeneric,
} from "convex/server";
import { ConvexError, v } from "convex/values";
import type schema from "./schema.js";

// What `_generated/server` does.
type DataModel = DataModelFromSchemaDefinition<typeof schema>;
const query = queryGeneric as QueryBuilder<DataModel, "public">;
const mutation = mutationGeneric as MutationBuilder<DataModel, "public">;
const internalMutation = internalMutationGeneric as MutationBuilder<DataModel, "internal">;

const rank = v.optional(v.union(v.number(), v.null(), v.string()));

export const add = mutation({
  args: { author: v.string(), rank, extra: v.optional(v.any()) },
  returns: v.string(),
  handler: (ctx, note) => ctx.db.insert("notes", note),
});

export const addMany = internalMutation({
  args: { author: v.string(), from: v.number(), count: v.number() },
  handler: async (ctx, { author, from, count }) => {
    for (let rank = from; rank < from + count; rank += 1) await ctx.db.insert("notes", { author, rank });
  },
});

/** Reads a range of ranks of an author, with the bounds that are given. */
export const ranks = query({
  args: {
    author: v.string(),
    eq: rank,
    gt: rank,
    gte: rank,
    lt: rank,
    lte: rank,
    order: v.optional(v.union(v.literal("asc"), v.literal("desc"))),
    limit: v.optional(v.number()),
  },
  handler: async (ctx, { author, order = "asc", limit = 1000, ...bounds }) => {
    const notes = await ctx.db
      .query("notes")
      .withIndex("by_author_rank", (q) => {
        const authors = q.eq("author", author);
        if ("eq" in bounds) return authors.eq("rank", bounds.eq);
        const lower =
          "gt" in bounds ? authors.gt("rank", bounds.gt) : "gte" in bounds ? authors.gte("rank", bounds.gte) : authors;
        return "lt" in bounds ? lower.lt("rank", bounds.lt) : "lte" in bounds ? lower.lte("rank", bounds.lte) : lower;
      })
      .order(order)
      .take(limit);
    return notes.map((note) => note.rank ?? "none");
  },
});

export const page = query({
  args: {
    paginationOpts: paginationOptsValidator,
    author: v.string(),
    order: v.union(v.literal("asc"), v.literal("desc")),
  },
  handler: async (ctx, { paginationOpts, author, order }) => {
    const page = await ctx.db
      .query("notes")
      .withIndex("by_author_rank", (q) => q.eq("author", author))
      .order(order)
      .paginate(paginationOpts);
    return { ranks: page.page.map((note) => note.rank), isDone: page.isDone, continueCursor: page.continueCursor };
  },
});

export const count = query({
  args: { author: v.string() },
  returns: v.number(),
  handler: async (ctx, { author }) =>
    (
      await ctx.db
        .query("notes")
        .withIndex("by_author", (q) => q.eq("author", author))
        .collect()
    ).length,
});

export const names = query({
  args: {},
  handler: async (ctx) => (await ctx.db.query("others").collect()).map((other) => other.name),
});

export const addName = mutation({
  args: { name: v.string() },
  handler: async (ctx, { name }) => {
    await ctx.db.insert("others", { name });
    return null;
  },
});

/** Moves each note of an author while it reads them, then reads them again. */
export const renumber = mutation({
  args: { author: v.string(), by: v.number() },
  handler: async (ctx, { author, by }) => {
    const mine = () => ctx.db.query("notes").withIndex("by_author_rank", (q) => q.eq("author", author));
    for (const note of await mine().collect()) await ctx.db.patch("notes", note._id, { rank: Number(note.rank) + by });
    const [lowest] = await mine().take(1);
    if (lowest !== undefined) await ctx.db.delete("notes", lowest._id);
    return (await mine().collect()).map((note) => note.rank);
  },
});

export const wrongResult = mutation({
  args: { author: v.string() },
  returns: v.string(),
  handler: async (ctx, { author }) => {
    await ctx.db.insert("notes", { author });
    return 5 as unknown as string;
  },
});

export const addAndFail = mutation({
  args: { author: v.string(), data: v.optional(v.any()) },
  handler: async (ctx, { author, data }) => {
    await ctx.db.insert("notes", { author });
    if (data !== undefined) throw new ConvexError(data);
    throw new Error("on purpose");
  },
});

/** Fails in a mutation within a mutation, and goes on. */
export const addInspiteOf = mutation({
  args: { author: v.string() },
  handler: async (ctx, { author }) => {
    await ctx.db.insert("notes", { author, rank: 1 });
    const fail = makeFunctionReference<"mutation">("notes:addAndFail");
    await ctx.runMutation(fail, { author }).catch(() => undefined);
    await ctx.db.insert("notes", { author, rank: 2 });
    return null;
  },
});

export const readAgain = query({
  args: { times: v.number() },
  handler: async (ctx, { times }) => {
    for (let time = 0; time < times; time += 1) {
      await ctx.db
        .query("notes")
        .withIndex("by_author", (q) => q.eq("author", String(time)))
        .first();
    }
    return null;
  },
});

export const echo = query({ args: { value: v.any() }, handler: async (_, { value }) => value });

export const whoAmI = query({ args: {}, handler: (ctx) => ctx.auth.getUserIdentity() });

declare const process: { env: Record<string, string | undefined> };

export const variables = query({ args: {}, handler: async () => Object.keys(process.env).sort() });

export const addByAction = action({
  args: { author: v.string() },
  handler: async (ctx, { author }) => {
    await ctx.runMutation(makeFunctionReference<"mutation">("notes:add"), { author });
    return await ctx.runQuery(makeFunctionReference<"query">("notes:count"), { author });
  },
});

export const addLater = mutation({
  args: { author: v.string() },
  handler: async (ctx, { author }) => {
    await ctx.scheduler.runAfter(10, makeFunctionReference<"mutation">("notes:add"), { author });
    return null;
  },
});
