use sqlx::{PgPool, postgres::PgListener};
use std::{convert::Infallible, time::Duration};

/// Pause before the next attempt to listen while the database is away.
const RECONNECT: Duration = Duration::from_millis(250);

/// What a listener hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard<'a> {
    /// A notification with this payload.
    Payload(&'a str),
    /// It listens from now on; whatever was said before is lost, so look for yourself.
    Listening,
}

/// Listens on `channel` for ever, over every restart of the database.
pub(crate) async fn listen(pool: PgPool, channel: &'static str, mut heard: impl FnMut(Heard<'_>)) -> Infallible {
    let mut down = false;
    loop {
        let Err(error) = listen_once(&pool, channel, &mut heard, &mut down).await;
        if !down {
            tracing::warn!(%channel, error = &error as &dyn std::error::Error, "lost the database, will listen again");
            down = true;
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn listen_once(
    pool: &PgPool,
    channel: &'static str,
    heard: &mut impl FnMut(Heard<'_>),
    down: &mut bool,
) -> Result<Infallible, sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(channel).await?;
    *down = false;
    heard(Heard::Listening);
    loop {
        match listener.try_recv().await? {
            Some(notification) => heard(Heard::Payload(notification.payload())),
            None => heard(Heard::Listening),
        }
    }
}
