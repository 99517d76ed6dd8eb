//! Helpers that break, repeat and restart the steps of a workflow.
