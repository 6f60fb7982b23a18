/* eslint-disable */
/**
 * Generated `api` utility.
 *
 * THIS CODE IS AUTOMATICALLY GENERATED.
 *
 * To regenerate, run `npx convex dev`.
 * @module
 */

import type * as activities from "../activities.js";
import type * as alerts from "../alerts.js";
import type * as cdc from "../cdc.js";
import type * as crons from "../crons.js";
import type * as integerWithin from "../integerWithin.js";
import type * as isSame from "../isSame.js";
import type * as judgeContent from "../judgeContent.js";
import type * as mirrorTables from "../mirrorTables.js";
import type * as readAccess from "../readAccess.js";
import type * as whatFits from "../whatFits.js";

import type {
  ApiFromModules,
  FilterApi,
  FunctionReference,
} from "convex/server";

declare const fullApi: ApiFromModules<{
  activities: typeof activities;
  alerts: typeof alerts;
  cdc: typeof cdc;
  crons: typeof crons;
  integerWithin: typeof integerWithin;
  isSame: typeof isSame;
  judgeContent: typeof judgeContent;
  mirrorTables: typeof mirrorTables;
  readAccess: typeof readAccess;
  whatFits: typeof whatFits;
}>;

/**
 * A utility for referencing Convex functions in your app's public API.
 *
 * Usage:
 * ```js
 * const myFunctionReference = api.myModule.myFunction;
 * ```
 */
export declare const api: FilterApi<
  typeof fullApi,
  FunctionReference<any, "public">
>;

/**
 * A utility for referencing Convex functions in your app's internal API.
 *
 * Usage:
 * ```js
 * const myFunctionReference = internal.myModule.myFunction;
 * ```
 */
export declare const internal: FilterApi<
  typeof fullApi,
  FunctionReference<any, "internal">
>;

export declare const components: {};
