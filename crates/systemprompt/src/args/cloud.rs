use clap::{Args, Subcommand};
use std::path::PathBuf;
use systemprompt_contract::{CheckoutId, Region, TenantName};

#[derive(Debug, Subcommand)]
pub(crate) enum CloudCommand {
    /// Sign in and out.
    #[command(subcommand)]
    Auth(AuthCommand),
    /// Create, list, show, select and delete tenants.
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Checkouts, for the operator of an installation with manual billing.
    #[command(subcommand)]
    Checkout(CheckoutCommand),
    /// Build the project's image, push it and make it the live release.
    Deploy(DeployArgs),
    /// Show who is signed in and how the tenants are.
    Status(TenantArgs),
    /// Show the lines of the newest instance.
    Logs(LogsArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuthCommand {
    /// Sign in by browser, or with a token.
    Login(LoginArgs),
    /// Revoke the token and forget it.
    Logout {
        /// Do not ask.
        #[arg(short, long)]
        yes: bool,
    },
    /// Show who is signed in, and for how long.
    Whoami,
}

#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    /// Read a token from standard input instead of using a browser; only `-` is accepted, since arguments can be seen
    /// by other users.
    #[arg(long, value_name = "-")]
    pub(crate) token: Option<String>,
    /// Only print the address; open it yourself.
    #[arg(long, conflicts_with = "token")]
    pub(crate) no_browser: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Buy a tenant and wait until its infrastructure stands.
    Create {
        /// Display name; without it the project's directory.
        #[arg(long)]
        name: Option<TenantName>,
        /// Where: iad, lhr, fra, ams, sin, nrt, syd or gru.
        #[arg(long, default_value_t)]
        region: Region,
        /// Plan by id or name; not needed where there is only one.
        #[arg(long)]
        plan: Option<String>,
        /// Go on waiting for a checkout that was started before.
        #[arg(long, value_name = "ID", conflicts_with_all = ["name", "plan"])]
        checkout: Option<CheckoutId>,
        /// Only print the address of the checkout; open it yourself.
        #[arg(long)]
        no_browser: bool,
        /// Give up waiting after so many seconds; the checkout stays.
        #[arg(long, value_name = "SECONDS", default_value_t = 900)]
        timeout: u64,
    },
    /// List the tenants of this account and of this project.
    List,
    /// Show one tenant.
    Show {
        /// Without it the tenant in force.
        id: Option<String>,
    },
    /// Make a tenant the one in force, where neither --tenant nor the profile names one.
    Select {
        /// Its id.
        id: String,
    },
    /// Take a tenant out of service; its data goes after 48 hours.
    Delete {
        /// Without it the tenant in force.
        id: Option<String>,
        /// Do not ask.
        #[arg(short, long)]
        yes: bool,
        /// Delete its data at once; nothing can be restored.
        #[arg(long)]
        purge: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckoutCommand {
    /// Confirm that a checkout is paid.
    Confirm {
        /// As `tenant create` printed it.
        id: CheckoutId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DeployArgs {
    #[command(flatten)]
    pub(crate) tenant: TenantArgs,
    /// Show what would go into the image, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// File or folder whose secrets are meant to be in the image; relative to the project, may be repeated.
    #[arg(long, value_name = "PATH")]
    pub(crate) allow_secret: Vec<PathBuf>,
    /// Send nothing; the very same image must have been pushed before.
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) skip_push: bool,
    /// Program to run in the image instead of this one.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) binary: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TenantArgs {
    /// Tenant id; without it the profile's, else the selected one.
    #[arg(long, value_name = "ID", env = "SYSTEMPROMPT_TENANT_ID", hide_env_values = true)]
    pub(crate) tenant: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) tenant: TenantArgs,
    /// Go on with every line that follows.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// How many lines to begin with.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(0..=10_000))]
    pub(crate) lines: u16,
    /// Print lines as the app wrote them, control characters and all; never on a terminal.
    #[arg(long)]
    pub(crate) raw: bool,
}
