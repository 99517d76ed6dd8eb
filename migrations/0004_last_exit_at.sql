-- When the noted end of the live instance happened: one end is counted once, whoever looks at it how often.
ALTER TABLE deployments ADD COLUMN last_exit_at timestamptz;
