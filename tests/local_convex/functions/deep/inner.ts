import { internalQueryGeneric as internalQuery, queryGeneric as query } from "convex/server";

export default query({ args: {}, handler: async () => "the default export" });

export const hidden = internalQuery({ args: {}, handler: async () => "hidden" });
