-- 0006 left the log out. But after a restore or a fail-over the worker deletes what is left in it of transactions that this
-- Postgres does not know (cdc_worker/opening.py): with a publication `for all tables` that was refused, and no session
-- opened any more.
alter table cdc.outbox_0 replica identity full;
alter table cdc.outbox_1 replica identity full;
alter table cdc.outbox_2 replica identity full;
