-- The tables with rows behind a mirror when the worker last looked: partitions and heirs come and go past every trigger.
-- Null: it has not looked yet.
alter table cdc.mirror add column tables bigint[];
