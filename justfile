# Short names for what `cargo xtask` does. Nothing here is required.

# Start the whole cloud in the foreground.
up *args:
    cargo xtask up {{args}}

# The inner loop.
check:
    cargo xtask check

# Everything.
test:
    cargo xtask test

# Write .sqlx anew.
sqlx:
    cargo xtask sqlx

# Figures.
bench:
    cargo xtask bench spine
