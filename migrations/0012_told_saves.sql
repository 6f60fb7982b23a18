-- saves, as Convex was told it last: a deployment that remembers less when its shard is opened was set back meanwhile.
alter table cdc.checkpoint add column told_saves bigint not null default 0;
