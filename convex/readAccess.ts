import { ConvexError } from "convex/values";
import type { QueryCtx } from "./_generated/server";

// Convex functions see the deployment's environment here, and nothing else of Node's `process`.
declare const process: { env: Record<string, string | undefined> };

/**
 * Passes if the caller may read the rows of this user: the caller is that user, or the deployment is public.
 *
 * @throws ConvexError `unauthenticated` if nobody is logged in, `forbidden` if somebody else is.
 */
export async function requireReadAccess(ctx: QueryCtx, userId: string): Promise<void> {
  if (process.env.ALLOW_PUBLIC_READS === "true") return;
  const identity = await ctx.auth.getUserIdentity();
  if (identity === null) {
    throw new ConvexError({
      code: "unauthenticated",
      message:
        "Only the user whose rows these are may read them, and nobody is logged in. Send the user's token (the " +
        "deployment needs an auth provider in convex/auth.config.ts), or set ALLOW_PUBLIC_READS=true on the " +
        "deployment to show every user's rows to anyone.",
    });
  }
  if (identity.subject !== userId) {
    throw new ConvexError({
      code: "forbidden",
      message:
        "Only the user whose rows these are may read them, and another one is logged in. Ask for the userId that is " +
        "the subject of the caller's token, or set ALLOW_PUBLIC_READS=true on the deployment to show every user's " +
        "rows to anyone.",
    });
  }
}
