//! One module a noun. A command gets values and a printer, and asks neither the command line nor the environment.

mod auth;
mod checkout;
mod deploy;
mod logs;
mod services;
mod status;
mod tenant;
mod tenant_create;

use crate::{
    args::{
        AuthCommand, CheckoutCommand, CloudCommand, Command, InfraCommand, LoginArgs, ServicesCommand, TenantCommand,
    },
    error::CliError,
    output::Printer,
    settings::Settings,
};
use std::time::Duration;
use systemprompt_cloud::ApiUrl;

pub(crate) async fn run(command: Command, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    match command {
        Command::Cloud(CloudCommand::Auth(command)) => auth(command, settings, printer).await,
        Command::Cloud(CloudCommand::Tenant(command)) => tenant(command, settings, printer).await,
        Command::Cloud(CloudCommand::Checkout(CheckoutCommand::Confirm { id })) => {
            checkout::confirm(id, settings, printer).await
        }
        Command::Cloud(CloudCommand::Deploy(args)) => {
            let request = deploy::Request {
                tenant: args.tenant.tenant,
                dry_run: args.dry_run,
                allow_secret: args.allow_secret,
                skip_push: args.skip_push,
                binary: args.binary,
            };
            deploy::deploy(request, settings, printer).await
        }
        Command::Cloud(CloudCommand::Status(args)) => status::status(args.tenant.as_deref(), settings, printer).await,
        Command::Cloud(CloudCommand::Logs(args)) => {
            let request = logs::Request {
                tenant: args.tenant.tenant,
                follow: args.follow,
                lines: args.lines.into(),
                raw: args.raw,
            };
            logs::logs(request, settings, printer).await
        }
        Command::Infra(InfraCommand::Services(ServicesCommand::Serve(_))) => services::serve(settings, printer).await,
    }
}

async fn auth(command: AuthCommand, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    match command {
        AuthCommand::Login(args) => auth::login(how_to_sign_in(&args, settings)?, settings, printer).await,
        AuthCommand::Logout { yes } => auth::logout(yes, settings, printer).await,
        AuthCommand::Whoami => auth::whoami(settings, printer).await,
    }
}

fn how_to_sign_in(args: &LoginArgs, settings: &Settings) -> Result<auth::How, CliError> {
    let command = settings.sign_in_url().sign_in_command();
    match args.token.as_deref() {
        Some("-") => Ok(auth::How::Token),
        Some(_) => Err(CliError::usage("a token as an argument can be seen by other users of this machine")
            .hint(format!("Pipe it: {command} --token - < FILE"))),
        None if args.no_browser => Ok(auth::How::Browser { open: false }),
        None if settings.interactive => Ok(auth::How::Browser { open: true }),
        None => Err(CliError::new("not_interactive", "there is no terminal, so no browser can be used")
            .hint(format!("Pipe a token: {command} --token - < FILE, or print the address: --no-browser"))),
    }
}

async fn tenant(command: TenantCommand, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    match command {
        TenantCommand::Create { name, region, plan, checkout, no_browser, timeout } => {
            let request = tenant_create::Request {
                name,
                region,
                plan,
                checkout,
                open_browser: !no_browser && settings.interactive,
                within: Duration::from_secs(timeout),
            };
            tenant_create::create(request, settings, printer).await
        }
        TenantCommand::List => tenant::list(settings, printer).await,
        TenantCommand::Show { id } => tenant::show(id.as_deref(), settings, printer).await,
        TenantCommand::Select { id } => tenant::select(&id, settings, printer).await,
        TenantCommand::Delete { id, yes, purge } => {
            let mode = if purge { tenant::DeleteMode::Purge } else { tenant::DeleteMode::Restorable };
            tenant::delete(id.as_deref(), mode, yes, settings, printer).await
        }
    }
}

/// Shows a page of the cloud. The address is the server's word, and other schemes start other programs than a browser.
fn open_in_browser(address: &str) -> bool {
    is_page(address) && webbrowser::open(address).is_ok()
}

fn is_page(address: &str) -> bool {
    url::Url::parse(address).is_ok_and(|url| url.origin().ascii_serialization().parse::<ApiUrl>().is_ok())
}

/// Asks before something is taken away; without a person it must have been said already.
fn confirmed(question: &str, yes: bool, settings: &Settings) -> Result<(), CliError> {
    if yes {
        return Ok(());
    }
    if !settings.interactive {
        return Err(CliError::usage("there is no terminal to ask at, and this cannot be taken back: say --yes"));
    }
    if crate::prompt::confirm(question)? { Ok(()) } else { Err(CliError::Declined) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_pages_are_opened() {
        for (address, expected) in [
            ("https://cloud.example/checkout/3", true),
            ("http://127.0.0.1:8480/login?a=b", true),
            ("http://cloud.example/", false),
            ("file:///etc/passwd", false),
            ("javascript:alert(1)", false),
            ("ssh://-oProxyCommand=x", false),
            ("cloud.example", false),
        ] {
            assert_eq!(super::is_page(address), expected, "{address}");
        }
    }
}
