use crate::{
    context::{Session, cloud_tenant},
    error::CliError,
    output::{ArtifactType, Printer, escaped},
    settings::Settings,
};
use std::io::IsTerminal as _;
use systemprompt_contract::{LogLine, LogStream};

pub(crate) struct Request {
    pub(crate) tenant: Option<String>,
    pub(crate) follow: bool,
    pub(crate) lines: usize,
    pub(crate) raw: bool,
}

pub(crate) async fn logs(request: Request, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    // What is piped into a file may be raw; what a terminal shows may not.
    if request.raw && std::io::stdout().is_terminal() {
        return Err(CliError::usage("--raw would let the app control this terminal; pipe it into a file or a program"));
    }
    let profile = settings.profile()?;
    let tenant = cloud_tenant(&settings.tenant_in_force(request.tenant.as_deref(), profile.as_ref())?)?;
    let Session { client, .. } = settings.session(printer)?;
    if request.follow {
        // A stream waits for a cloud that is away; whoever asks for the first time should learn it at once.
        client.status(tenant).await?;
        let mut follower = client.follow_logs(tenant, request.lines);
        loop {
            let line = follower.next().await?;
            printer.line(&line, &shown(&line, request.raw))?;
        }
    }
    let page = client.logs(tenant, request.lines).await?;
    if page.logs.is_empty() {
        printer.talk(if request.lines == 0 {
            "No lines, as asked."
        } else {
            "No lines: no instance has written any yet."
        });
    }
    if printer.is_json() {
        return printer.value(ArtifactType::Text, &page, |_| ());
    }
    for line in &page.logs {
        printer.line(line, &shown(line, request.raw))?;
    }
    Ok(())
}

/// The app's line; the platform's own words are marked, so that an app cannot speak for it.
fn shown(line: &LogLine, raw: bool) -> String {
    let message = if raw { line.message.clone() } else { escaped(&line.message).into_owned() };
    match line.stream {
        LogStream::Output => message,
        LogStream::Platform => format!("[platform] {message}"),
    }
}
