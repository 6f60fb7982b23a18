-- The demo's application, as `prisma migrate` would make it: quoted camelCase names, ids made by the
-- client (cuid), timestamp(3) without time zone in UTC. The worker needs nothing in here.

create type "AlertLevel" as enum ('L1', 'L2', 'L3', 'L4');

create table "User" (
    "id"             text not null,
    "email"          text not null,
    "name"           text not null,
    "lastCheckInAt"  timestamp(3),
    "nextCheckInDue" timestamp(3),
    "createdAt"      timestamp(3) not null default current_timestamp,
    "updatedAt"      timestamp(3) not null,
    constraint "User_pkey" primary key ("id")
);

create table "CheckIn" (
    "id"        text not null,
    "userId"    text not null,
    "mood"      text not null,
    "note"      text,
    "createdAt" timestamp(3) not null default current_timestamp,
    constraint "CheckIn_pkey" primary key ("id")
);

create table "Alert" (
    "id"          text not null,
    "userId"      text not null,
    "level"       "AlertLevel" not null,
    "reason"      text not null,
    "triggeredAt" timestamp(3) not null default current_timestamp,
    "resolvedAt"  timestamp(3),
    constraint "Alert_pkey" primary key ("id")
);

create table "Conversation" (
    "id"            text not null,
    "userId"        text not null,
    "title"         text not null,
    "messageCount"  integer not null default 0,
    "lastMessageAt" timestamp(3) not null,
    "createdAt"     timestamp(3) not null default current_timestamp,
    constraint "Conversation_pkey" primary key ("id")
);

create unique index "User_email_key" on "User" ("email");
create index "CheckIn_userId_createdAt_idx" on "CheckIn" ("userId", "createdAt");
create index "Alert_userId_resolvedAt_idx" on "Alert" ("userId", "resolvedAt");
create index "Conversation_userId_lastMessageAt_idx" on "Conversation" ("userId", "lastMessageAt");

alter table "CheckIn" add constraint "CheckIn_userId_fkey"
    foreign key ("userId") references "User" ("id") on delete cascade on update cascade;
alter table "Alert" add constraint "Alert_userId_fkey"
    foreign key ("userId") references "User" ("id") on delete cascade on update cascade;
alter table "Conversation" add constraint "Conversation_userId_fkey"
    foreign key ("userId") references "User" ("id") on delete cascade on update cascade;
