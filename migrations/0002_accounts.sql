-- People, how they sign in, and what they buy. Tokens and codes are stored as SHA-256 only.

CREATE TYPE account_role AS ENUM ('operator', 'member');

CREATE TABLE accounts (
    id            uuid PRIMARY KEY,
    -- In its one spelling, lower case, so that UNIQUE means one account per address.
    email         text NOT NULL UNIQUE CHECK (email = lower(email) AND email ~ '^[^@[:space:]]+@[^@[:space:]]+$'
                                              AND octet_length(email) <= 254),
    name          text CHECK (char_length(name) BETWEEN 1 AND 128),
    role          account_role NOT NULL,
    -- argon2id as a PHC string, with its own parameters and salt.
    password_hash text NOT NULL CHECK (password_hash LIKE '$argon2id$%'),
    created_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_tokens (
    id           uuid PRIMARY KEY,
    account_id   uuid NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    token_hash   bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    -- Where it came from, for the list that a person revokes from.
    label        text NOT NULL CHECK (char_length(label) BETWEEN 1 AND 64),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz,
    -- To the minute: a write per request would be too dear.
    last_used_at timestamptz,
    CHECK (expires_at > created_at)
);
CREATE INDEX api_tokens_account ON api_tokens (account_id);

-- Codes of the browser flow: 60 seconds, once, bound to the redirect and the PKCE challenge (RFC 7636).
CREATE TABLE login_codes (
    code_hash      bytea PRIMARY KEY CHECK (octet_length(code_hash) = 32),
    account_id     uuid NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    redirect_uri   text NOT NULL,
    -- SHA-256 of the verifier (method S256; there is no other).
    code_challenge bytea NOT NULL CHECK (octet_length(code_challenge) = 32),
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL,
    used_at        timestamptz,
    -- What the code was exchanged for: a second use revokes it (RFC 6749, 4.1.2).
    token_id       uuid REFERENCES api_tokens (id) ON DELETE CASCADE,
    CHECK (expires_at > created_at),
    CHECK (token_id IS NULL OR used_at IS NOT NULL)
);
CREATE INDEX login_codes_expiry ON login_codes (expires_at);

-- The first administrator's one-time token. Kept when used, so that a second use can be told from a wrong token.
CREATE TABLE setup_tokens (
    token_hash bytea PRIMARY KEY CHECK (octet_length(token_hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at    timestamptz
);
-- At most one can be open.
CREATE UNIQUE INDEX setup_tokens_one_open ON setup_tokens ((used_at IS NULL)) WHERE used_at IS NULL;

CREATE TYPE checkout_status AS ENUM ('open', 'confirmed');

-- What somebody wants to buy. Price and size are read from here when it is confirmed, never from the confirmation.
CREATE TABLE checkouts (
    id              uuid PRIMARY KEY,
    account_id      uuid NOT NULL REFERENCES accounts (id),
    price_id        text NOT NULL,
    plan_name       text NOT NULL,
    memory_mb       integer NOT NULL CHECK (memory_mb > 0),
    volume_gb       integer NOT NULL CHECK (volume_gb >= 0),
    region          text NOT NULL CHECK (region IN ('iad', 'lhr', 'fra', 'ams', 'sin', 'nrt', 'syd', 'gru')),
    tenant_name     text NOT NULL CHECK (char_length(tenant_name) BETWEEN 1 AND 64),
    -- Loopback only: where the browser is sent back to.
    redirect_uri    text,
    -- The same key answers the same checkout; with another request it is refused.
    idempotency_key text CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
    request_hash    bytea CHECK (octet_length(request_hash) = 32),
    status          checkout_status NOT NULL DEFAULT 'open',
    -- Made by the confirmation; `tenants` refers back to this row.
    tenant_id       uuid UNIQUE,
    created_at      timestamptz NOT NULL DEFAULT now(),
    confirmed_at    timestamptz,
    UNIQUE (account_id, idempotency_key),
    CHECK ((idempotency_key IS NULL) = (request_hash IS NULL)),
    CHECK ((status = 'confirmed') = (tenant_id IS NOT NULL)),
    CHECK ((status = 'confirmed') = (confirmed_at IS NOT NULL))
);
CREATE INDEX checkouts_account ON checkouts (account_id);

-- What became of a signed event: each is taken once, in the transaction that enqueues its work.
CREATE TYPE inbox_outcome AS ENUM ('applied', 'ignored');

CREATE TABLE inbox_events (
    event_id    text PRIMARY KEY CHECK (octet_length(event_id) BETWEEN 1 AND 255),
    source      text NOT NULL CHECK (source IN ('manual')),
    kind        text NOT NULL CHECK (octet_length(kind) BETWEEN 1 AND 128),
    -- When it happened at the source; deliveries may come late and out of order.
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    -- As it was signed, byte for byte.
    body        text NOT NULL CHECK (octet_length(body) <= 65536),
    outcome     inbox_outcome NOT NULL
);
