// graphile-worker with a local queue of 500 jobs: `graphile.mjs setup DSN SQL` and `graphile.mjs work DSN URL`.
import { run, runMigrations } from "graphile-worker";
import pg from "pg";
import { post } from "./post.mjs";

const [command, connectionString, argument] = process.argv.slice(2);
if (command === "setup") {
  await runMigrations({ connectionString });
  const client = new pg.Client({ connectionString });
  await client.connect();
  await client.query(`
    select count(*) from (select graphile_worker.add_jobs(array_agg(
      ('send', json_build_object('event', event), null, now(), 1::int2, null, 0::int2, null)::graphile_worker.job_spec))
    from (select event, row_number() over () / 1000 as part from (${argument}) as e) as numbered group by part) as added`);
  await client.end();
} else {
  await run({
    connectionString,
    concurrency: 24,
    maxPoolSize: 24,
    noHandleSignals: false,
    preset: { worker: { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } },
    logger: undefined,
    taskList: { send: (payload) => post(argument, payload.event) },
  });
}
