-- The files of a mirror's tables, in their order: an ALTER TABLE that rewrites a table gives it another one.
alter table cdc.mirror add column files bigint[];
