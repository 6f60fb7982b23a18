-- What version 0.1.0 made for a table t (id text primary key, note text) and the mirror 1: test_migrate.py upgrades it.
create function cdc.capture_f059f10c4aedb640() returns trigger language plpgsql security definer
set search_path = pg_catalog, pg_temp as $capture$
#variable_conflict use_column
<<capture>>
declare
    here constant smallint := coalesce(pg_sequence_last_value('cdc.slot'::regclass), 0);
begin
    begin
        case tg_op
            when 'INSERT' then perform cdc_new."id" from cdc_new limit 0;
            when 'UPDATE' then perform cdc_old."id", cdc_new."id" from cdc_old, cdc_new limit 0;
            when 'DELETE' then perform cdc_old."id" from cdc_old limit 0;
            else raise 'truncated';
        end case;
    exception when others then
        insert into cdc.outbox (slot, mirror) values (capture.here, 1);
        if not pg_try_advisory_xact_lock_shared(25444, 1) and current_setting('max_prepared_transactions') = '0' then
            perform pg_notify('cdc_outbox', '');
        end if;
        return null;
    end;
    case tg_op
        when 'INSERT' then
            insert into cdc.outbox (slot, mirror, key)
            select capture.here, 1, cdc_new."id"::text from cdc_new where cdc_new."id" is not null;
        when 'DELETE' then
            insert into cdc.outbox (slot, mirror, key)
            select capture.here, 1, cdc_old."id"::text from cdc_old where cdc_old."id" is not null;
        else
            insert into cdc.outbox (slot, mirror, key)
            select capture.here, candidate.mirror, candidate.key
            from (select row_number() over () as place, cdc_old."id"::text as key_0, row(cdc_old.*) as seen_0 from cdc_old) as o
            full join (select row_number() over () as place, cdc_new."id"::text as key_0, row(cdc_new.*) as seen_0 from cdc_new) as n on o.place = n.place
            cross join lateral (values
            (1, n.key_0, o.seen_0 *<> n.seen_0), (1, nullif(o.key_0, n.key_0), true)) as candidate (mirror, key, changed)
            where candidate.key is not null and candidate.changed is not false;
    end case;
    if found and not pg_try_advisory_xact_lock_shared(25444, 1)
            and current_setting('max_prepared_transactions') = '0' then
        perform pg_notify('cdc_outbox', '');
    end if;
    return null;
end
$capture$;
create trigger "cdc_insert" after insert on "public"."t" referencing new table as cdc_new for each statement execute function cdc."capture_f059f10c4aedb640"(); alter table only "public"."t" enable always trigger "cdc_insert";
create trigger "cdc_update" after update on "public"."t" referencing old table as cdc_old new table as cdc_new for each statement execute function cdc."capture_f059f10c4aedb640"(); alter table only "public"."t" enable always trigger "cdc_update";
create trigger "cdc_delete" after delete on "public"."t" referencing old table as cdc_old for each statement execute function cdc."capture_f059f10c4aedb640"(); alter table only "public"."t" enable always trigger "cdc_delete";
create trigger "cdc_truncate" after truncate on "public"."t"  for each statement execute function cdc."capture_f059f10c4aedb640"(); alter table only "public"."t" enable always trigger "cdc_truncate";
