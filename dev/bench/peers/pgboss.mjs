// pg-boss: eight workers, 500 jobs a fetch, all of them at once: `pgboss.mjs setup DSN SQL` and `pgboss.mjs work DSN URL`.
import pg from "pg";
import PgBoss from "pg-boss";
import { post } from "./post.mjs";

const [command, connectionString, argument] = process.argv.slice(2);
const boss = new PgBoss({ connectionString, max: 12 });
await boss.start();
await boss.createQueue("send");
if (command === "setup") {
  const client = new pg.Client({ connectionString });
  await client.connect();
  const { rows } = await client.query(argument);
  for (let start = 0; start < rows.length; start += 1000) {
    await boss.insert(rows.slice(start, start + 1000).map(({ event }) => ({ name: "send", data: { event } })));
  }
  await client.end();
  await boss.stop();
} else {
  for (let worker = 0; worker < 8; worker++) {
    await boss.work("send", { batchSize: 500, pollingIntervalSeconds: 0.5 }, async (jobs) => {
      await Promise.all(jobs.map((job) => post(argument, job.data.event)));
    });
  }
}
