-- The kind of a mirror's documents, in Convex too after it was taken out of cdc_worker.toml. Null: of a mirror from before,
-- until `migrate` finds it in there.
alter table cdc.mirror add column target text;
