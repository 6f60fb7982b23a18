import { cronJobs } from "convex/server";
import { internal } from "./_generated/api";

const crons = cronJobs();

crons.interval("prune tombstones", { hours: 1 }, internal.cdc.prune, {});

export default crons;
