import { type ApiFromModules, anyApi } from "convex/server";
import type * as inner from "./functions/deep/inner.js";
import type * as notes from "./functions/notes.js";

/** The functions of these tests, typed as `_generated/api` would have them. */
export const api = anyApi as unknown as ApiFromModules<{ "deep/inner": typeof inner; notes: typeof notes }>;
