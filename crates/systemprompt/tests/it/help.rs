use crate::{cli::Cli, cloud::Cloud};
use insta::assert_snapshot;

fn help(args: &[&str]) -> String {
    let cloud = Cloud::absent();
    let all = [args, &["--help"]].concat();
    let ended = Cli::new(&cloud).run(&all);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    // The global options are the same everywhere; the first snapshot has them.
    match ended.stdout.split_once("\nGlobal options:") {
        Some((own, _)) if !args.is_empty() => own.to_owned(),
        _ => ended.stdout,
    }
}

#[test]
fn of_the_program() {
    assert_snapshot!(help(&[]), @r"
    Run a project on SystemPrompt Cloud

    Usage: systemprompt [OPTIONS] <COMMAND>

    Commands:
      cloud  Tenants in the cloud: sign in, buy, deploy, look
      infra  The tenant's own server

    Options:
      -h, --help     Print help
      -V, --version  Print version

    Global options:
          --json             Print exactly one JSON value on standard output (one a line when following)
          --profile <NAME>   Profile by name or path; without it the only one, or the only one for the
                             cloud [env: SYSTEMPROMPT_PROFILE]
          --api-url <URL>    Management API to call; without it the one that is signed in to [env:
                             SYSTEMPROMPT_API_URL]
          --ca-file <FILE>   Further certificate authorities to trust, PEM [env: SYSTEMPROMPT_CA_FILE]
          --no-color         No colours (also NO_COLOR)
          --non-interactive  Never ask [env: SYSTEMPROMPT_NON_INTERACTIVE]
      -v, --verbose...       Say more on standard error; twice for everything
      -q, --quiet            Say nothing on standard error but errors
    ");
}

#[test]
fn of_the_groups() {
    assert_snapshot!(help(&["cloud"]), @r"
    Tenants in the cloud: sign in, buy, deploy, look

    Usage: systemprompt cloud [OPTIONS] <COMMAND>

    Commands:
      auth      Sign in and out
      tenant    Create, list, show, select and delete tenants
      checkout  Checkouts, for the operator of an installation with manual billing
      deploy    Build the project's image, push it and make it the live release
      status    Show who is signed in and how the tenants are
      logs      Show the lines of the newest instance

    Options:
      -h, --help  Print help
    ");
    assert_snapshot!(help(&["cloud", "auth"]), @r"
    Sign in and out

    Usage: systemprompt cloud auth [OPTIONS] <COMMAND>

    Commands:
      login   Sign in by browser, or with a token
      logout  Revoke the token and forget it
      whoami  Show who is signed in, and for how long

    Options:
      -h, --help  Print help
    ");
    assert_snapshot!(help(&["cloud", "tenant"]), @r"
    Create, list, show, select and delete tenants

    Usage: systemprompt cloud tenant [OPTIONS] <COMMAND>

    Commands:
      create  Buy a tenant and wait until its infrastructure stands
      list    List the tenants of this account and of this project
      show    Show one tenant
      select  Make a tenant the one in force, where neither --tenant nor the profile names one
      delete  Take a tenant out of service; its data goes after 48 hours

    Options:
      -h, --help  Print help
    ");
    assert_snapshot!(help(&["infra", "services"]), @r"
    The services of this project

    Usage: systemprompt infra services [OPTIONS] <COMMAND>

    Commands:
      serve  Run the tenant's server; settings come from the environment [alias: start]

    Options:
      -h, --help  Print help
    ");
}

#[test]
fn of_the_commands() {
    assert_snapshot!(help(&["cloud", "auth", "login"]), @r"
    Sign in by browser, or with a token

    Usage: systemprompt cloud auth login [OPTIONS]

    Options:
          --token <->   Read a token from standard input instead of using a browser; only `-` is
                        accepted, since arguments can be seen by other users
          --no-browser  Only print the address; open it yourself
      -h, --help        Print help
    ");
    assert_snapshot!(help(&["cloud", "tenant", "create"]), @r"
    Buy a tenant and wait until its infrastructure stands

    Usage: systemprompt cloud tenant create [OPTIONS]

    Options:
          --name <NAME>        Display name; without it the project's directory
          --region <REGION>    Where: iad, lhr, fra, ams, sin, nrt, syd or gru [default: iad]
          --plan <PLAN>        Plan by id or name; not needed where there is only one
          --checkout <ID>      Go on waiting for a checkout that was started before
          --no-browser         Only print the address of the checkout; open it yourself
          --timeout <SECONDS>  Give up waiting after so many seconds; the checkout stays [default: 900]
      -h, --help               Print help
    ");
    assert_snapshot!(help(&["cloud", "tenant", "delete"]), @r"
    Take a tenant out of service; its data goes after 48 hours

    Usage: systemprompt cloud tenant delete [OPTIONS] [ID]

    Arguments:
      [ID]  Without it the tenant in force

    Options:
      -y, --yes    Do not ask
          --purge  Delete its data at once; nothing can be restored
      -h, --help   Print help
    ");
    assert_snapshot!(help(&["cloud", "deploy"]), @r"
    Build the project's image, push it and make it the live release

    Usage: systemprompt cloud deploy [OPTIONS]

    Options:
          --tenant <ID>          Tenant id; without it the profile's, else the selected one [env:
                                 SYSTEMPROMPT_TENANT_ID]
          --dry-run              Show what would go into the image, and stop
          --allow-secret <PATH>  File or folder whose secrets are meant to be in the image; relative to
                                 the project, may be repeated
          --skip-push            Send nothing; the very same image must have been pushed before
      -h, --help                 Print help
    ");
    assert_snapshot!(help(&["cloud", "logs"]), @r"
    Show the lines of the newest instance

    Usage: systemprompt cloud logs [OPTIONS]

    Options:
          --tenant <ID>  Tenant id; without it the profile's, else the selected one [env:
                         SYSTEMPROMPT_TENANT_ID]
      -f, --follow       Go on with every line that follows
      -n, --lines <N>    How many lines to begin with [default: 100]
          --raw          Print lines as the app wrote them, control characters and all; never on a
                         terminal
      -h, --help         Print help
    ");
    assert_snapshot!(help(&["infra", "services", "start"]), @r"
    Run the tenant's server; settings come from the environment

    Usage: systemprompt infra services serve [OPTIONS]

    Options:
          --foreground  Stay in the foreground (always so)
          --all         Start everything (always so)
      -h, --help        Print help
    ");
}

#[test]
fn the_version_is_one_line() {
    let cloud = Cloud::absent();
    let ended = Cli::new(&cloud).run(&["--version"]);
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), concat!("systemprompt ", env!("CARGO_PKG_VERSION"), "\n"))
    );
}
