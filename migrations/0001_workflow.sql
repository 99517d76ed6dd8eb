-- Durable operations and the event log: the tables of systemprompt-workflow.

CREATE TYPE operation_status AS ENUM ('queued', 'running', 'unwinding', 'succeeded', 'failed', 'stuck');

CREATE TABLE operations (
    id               uuid PRIMARY KEY,
    -- `Workflow::NAME`; a worker that does not know it leaves the row alone.
    workflow         text NOT NULL CHECK (workflow ~ '^[a-z][a-z0-9_]{0,62}$'),
    -- Idempotency key: asking twice for the same thing is one operation.
    key              text NOT NULL CHECK (char_length(key) BETWEEN 1 AND 200),
    -- `tenant:{id}` or `checkout:{id}`.
    subject          text NOT NULL,
    input            jsonb NOT NULL,
    -- What steps hand to later steps; NULL until one has handed over something.
    state            jsonb,
    status           operation_status NOT NULL DEFAULT 'queued',
    -- Why it unwinds or failed: an `ApiError`.
    failure          jsonb,
    -- Why it is parked: an `ApiError`.
    parked           jsonb,
    -- True while parked on the way back: an undo failed. False: a step behind the pivot failed.
    parked_unwinding boolean,
    cancel_requested boolean NOT NULL DEFAULT false,
    -- Raised at every claim; who writes must name the value it claimed with.
    fence            bigint NOT NULL DEFAULT 0 CHECK (fence >= 0),
    worker           text,
    -- By the database's clock. Behind it, another worker may claim the row.
    lease_until      timestamptz,
    -- Not to be claimed before: a transient error backs off until then.
    available_at     timestamptz NOT NULL DEFAULT now(),
    created_at       timestamptz NOT NULL DEFAULT now(),
    finished_at      timestamptz,
    UNIQUE (workflow, key),
    CHECK ((worker IS NULL) = (lease_until IS NULL)),
    CHECK (worker IS NULL OR status IN ('queued', 'running', 'unwinding')),
    CHECK ((status IN ('succeeded', 'failed')) = (finished_at IS NOT NULL)),
    CHECK (status NOT IN ('unwinding', 'failed') OR failure IS NOT NULL),
    CHECK (status NOT IN ('queued', 'running', 'succeeded') OR failure IS NULL),
    CHECK ((status = 'stuck') = (parked IS NOT NULL)),
    CHECK ((status = 'stuck') = (parked_unwinding IS NOT NULL)),
    CHECK (parked_unwinding IS NULL OR parked_unwinding = (failure IS NOT NULL))
);
COMMENT ON TABLE operations IS 'One row per durable operation; transitions in systemprompt-workflow, journal.rs';
CREATE INDEX operations_due ON operations (available_at) WHERE status IN ('queued', 'running', 'unwinding');
CREATE INDEX operations_active ON operations (subject) WHERE status NOT IN ('succeeded', 'failed');
CREATE INDEX operations_stuck ON operations (created_at) WHERE status = 'stuck';

CREATE TYPE operation_step_mark AS ENUM ('started', 'done', 'undoing', 'undone');

CREATE TABLE operation_steps (
    operation_id  uuid NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
    position      smallint NOT NULL CHECK (position >= 0),
    name          text NOT NULL,
    mark          operation_step_mark NOT NULL,
    -- Attempts of what the mark says: of the act while started, of the undo while undoing.
    attempts      integer NOT NULL CHECK (attempts >= 0),
    -- The last error, for operators.
    error         text,
    started_at    timestamptz NOT NULL DEFAULT now(),
    changed_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (operation_id, position),
    UNIQUE (operation_id, name)
);
COMMENT ON TABLE operation_steps IS 'The journal: `started` is committed before a step acts, so an adopter knows what may have happened';

CREATE TABLE events (
    -- Position in the log. Appended under a lock of the subject, so that ids of one stream commit in order.
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject      text NOT NULL,
    body         jsonb NOT NULL CHECK (body ? 'event' AND body ? 'data'),
    operation_id uuid REFERENCES operations (id) ON DELETE SET NULL,
    created_at   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE events IS 'What streams replay: written in the transaction of what they report, delivered by NOTIFY systemprompt_events';
CREATE INDEX events_stream ON events (subject, id);
CREATE INDEX events_operation ON events (operation_id) WHERE operation_id IS NOT NULL;
