import { expect, test } from "vitest";
import * as activities from "../../convex/activities";
import * as alerts from "../../convex/alerts";
import * as cdc from "../../convex/cdc";

test("everyone may call the two queries, and nothing else", () => {
  const all = Object.entries({ ...activities, ...alerts, ...cdc });
  const open = all.filter(([, registered]) => "isPublic" in registered).map(([name]) => name);
  expect(all.map(([name]) => name).sort()).toEqual(
    [
      "addActivity",
      "apply",
      "getRecentActivities",
      "getUserStatus",
      "keys",
      "noteSaves",
      "open",
      "prune",
      "updateUserStatus",
    ].sort(),
  );
  expect(open.sort()).toEqual(["getRecentActivities", "getUserStatus"]);
});
