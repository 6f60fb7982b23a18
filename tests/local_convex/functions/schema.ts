import { defineSchema, defineTable } from "convex/server";
import { v } from "convex/values";

export default defineSchema({
  notes: defineTable({
    author: v.string(),
    rank: v.optional(v.union(v.number(), v.null(), v.string())),
    extra: v.optional(v.any()),
  })
    .index("by_author", ["author"])
    .index("by_author_rank", ["author", "rank"])
    .index("by_extra_place", ["extra.place"]),
  others: defineTable({ name: v.string() }),
});
