//! The engine and the event log on real PostgreSQL.
