import type { ObjectType, Value } from "convex/values";
import type { MutationCtx } from "./_generated/server";
import { type Judgement, judgeContent } from "./judgeContent";
import { activityContent, statusContent, UNVERSIONED, type Version } from "./schema";

/** What `cdc:apply` needs of a table: to judge a content, to find what stands under a key, to write. */
export interface MirrorTable<Content> {
  /** Events with the same slot change the same document. */
  slot(key: string): string;
  judge(key: string, document: unknown): Judgement<Content>;
  /** All documents of the key. More than one is nothing the worker does, but an import into the table may. */
  find(ctx: MutationCtx, key: string): Promise<Stored<Content>[]>;
  insert(ctx: MutationCtx, key: string, content: Content, version: Version): Promise<unknown>;
}

export interface Stored<Content> {
  content: Value;
  version: Version;
  replace(content: Content, version: Version): Promise<void>;
  remove(): Promise<void>;
}

export const activityTable: MirrorTable<ObjectType<typeof activityContent>> = {
  slot: (key) => `activity ${key}`,

  judge: (_key, document) => judgeContent(activityContent, document),

  async find(ctx, key) {
    const documents = await ctx.db
      .query("activities")
      .withIndex("by_key", (q) => q.eq("key", key))
      .collect();
    return documents.map(({ _id, _creationTime, key: _key, version = UNVERSIONED, ...content }) => ({
      content,
      version,
      replace: (content, version) => ctx.db.replace("activities", _id, { ...content, key, version }),
      remove: () => ctx.db.delete("activities", _id),
    }));
  },

  insert: (ctx, key, content, version) => ctx.db.insert("activities", { ...content, key, version }),
};

export const statusTable: MirrorTable<ObjectType<typeof statusContent>> = {
  slot: (key) => `status ${keyWithinMirror(key)}`,

  judge(key, document) {
    const judgement = judgeContent(statusContent, document);
    if ("content" in judgement && judgement.content.userId !== keyWithinMirror(key)) {
      return { rejected: "userId must be the part of the key behind the colon" };
    }
    return judgement;
  },

  async find(ctx, key) {
    const documents = await ctx.db
      .query("userStatus")
      .withIndex("by_user", (q) => q.eq("userId", keyWithinMirror(key)))
      .collect();
    return documents.map(({ _id, _creationTime, version, ...content }) => ({
      content,
      version,
      replace: (content, version) => ctx.db.replace("userStatus", _id, { ...content, version }),
      remove: () => ctx.db.delete("userStatus", _id),
    }));
  },

  insert: (ctx, _key, content, version) => ctx.db.insert("userStatus", { ...content, version }),
};

/** "u:1" of "status:u:1". The name of a mirror has no colon, a key may have some. */
function keyWithinMirror(key: string): string {
  return key.slice(key.indexOf(":") + 1);
}
