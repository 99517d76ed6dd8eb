-- Tenants, their releases, secrets and routes.

CREATE TYPE tenant_phase AS ENUM
    ('provisioning', 'awaiting_deploy', 'deploying', 'running', 'stopped', 'suspended', 'failed', 'deleted');

CREATE TABLE tenants (
    id               uuid PRIMARY KEY,
    -- First twelve hex digits of the id: app, host, role and database are named after it.
    slug             text NOT NULL UNIQUE GENERATED ALWAYS AS (left(replace(id::text, '-', ''), 12)) STORED,
    account_id       uuid NOT NULL REFERENCES accounts (id),
    checkout_id      uuid NOT NULL UNIQUE REFERENCES checkouts (id),
    name             text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 64),
    region           text NOT NULL,
    memory_mb        integer NOT NULL CHECK (memory_mb > 0),
    phase            tenant_phase NOT NULL DEFAULT 'provisioning',
    -- The one operation that may change this tenant now.
    active_operation uuid,
    live_deployment  uuid,
    app_handle       text,
    failure          text,
    created_at       timestamptz NOT NULL DEFAULT now(),
    ready_at         timestamptz,
    purge_after      timestamptz,
    CHECK ((phase = 'deleted') = (purge_after IS NOT NULL)),
    CHECK (phase <> 'failed' OR failure IS NOT NULL),
    CHECK (phase NOT IN ('running', 'stopped') OR live_deployment IS NOT NULL),
    CHECK (phase NOT IN ('provisioning', 'deploying') OR active_operation IS NOT NULL)
);
CREATE INDEX tenants_account ON tenants (account_id) WHERE phase <> 'deleted';
CREATE INDEX tenants_purge ON tenants (purge_after) WHERE phase = 'deleted';

-- Sealed with the installation's key; the context binds a value to its tenant and name.
CREATE TABLE tenant_secrets (
    tenant_id  uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name       text NOT NULL CHECK (name ~ '^[A-Z][A-Z0-9_]{0,127}$'),
    sealed     bytea NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, name)
);

CREATE TYPE deployment_state AS ENUM ('pending', 'live', 'retired', 'failed');

-- A deployment is also the release it makes; the row's image and digest never change.
CREATE TABLE deployments (
    id           uuid PRIMARY KEY,
    tenant_id    uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    image        text NOT NULL,
    digest       text NOT NULL CHECK (digest ~ '^sha256:[0-9a-f]{64}$'),
    operation_id uuid NOT NULL,
    request_key  text NOT NULL,
    state        deployment_state NOT NULL DEFAULT 'pending',
    instance     text,
    failure      text,
    -- Crashes of the live instance since it became live, and what the last one was.
    restarts     integer NOT NULL DEFAULT 0,
    last_exit    text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    live_at      timestamptz,
    ended_at     timestamptz,
    UNIQUE (tenant_id, request_key),
    CHECK (state NOT IN ('live', 'retired') OR live_at IS NOT NULL)
);
CREATE UNIQUE INDEX deployments_one_live ON deployments (tenant_id) WHERE state = 'live';
CREATE UNIQUE INDEX deployments_one_pending ON deployments (tenant_id) WHERE state = 'pending';
CREATE INDEX deployments_releases ON deployments (tenant_id, live_at DESC);

-- Updated in the same transaction as a route, so generations commit in order: who has seen N has seen all below.
CREATE TABLE route_clock (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    generation bigint NOT NULL
);
INSERT INTO route_clock (generation) VALUES (0);

CREATE TABLE routes (
    host       text PRIMARY KEY CHECK (host = lower(host) AND host !~ '[:/ ]' AND host !~ '\.$'),
    tenant_id  uuid NOT NULL,
    -- NULL: the host is gone. The row stays for a day so that every edge sees it go.
    target     jsonb,
    generation bigint NOT NULL UNIQUE,
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- Edges that serve now, and the route generation that all their workers have.
CREATE TABLE edges (
    id         uuid PRIMARY KEY,
    generation bigint NOT NULL,
    seen_at    timestamptz NOT NULL DEFAULT now()
);
