//! What `up` says at the end.

use super::{Installation, Tenant, account};
use std::time::Duration;

/// How long the parts took; `None` where an earlier run had done them.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Timings {
    /// From the confirmation to `awaiting_deploy`.
    pub(crate) phase1: Option<Duration>,
    /// Wall time of the command line for the first deploy.
    pub(crate) deploy: Option<Duration>,
    /// The same with one changed file.
    pub(crate) redeploy: Option<Duration>,
    /// From the start of `management-api` to the verified answer.
    pub(crate) total: Option<Duration>,
}

/// The last line of `up --once`, for programs.
pub(super) fn last_line(url: &str, timings: &Timings) -> String {
    let ms = |time: Option<Duration>| time.map_or_else(|| "none".to_owned(), |time| time.as_millis().to_string());
    format!(
        "url={url} status=200 phase1_ms={} deploy_ms={} redeploy_ms={} total_ms={}",
        ms(timings.phase1),
        ms(timings.deploy),
        ms(timings.redeploy),
        ms(timings.total)
    )
}

/// What a person sees once everything answers.
pub(super) fn welcome(installation: &Installation, tenant: &Tenant) -> String {
    let data = installation.data.display();
    let project = installation.project();
    let (project, ca) = (project.display(), installation.ca_file());
    let ca = ca.display();
    let sign_in = format!("systemprompt cloud auth login --api-url {}", installation.url("api"));
    // Absent when a person made the first account on the set-up page.
    let account = Some(account::file(&installation.data))
        .filter(|file| file.exists())
        .map(|file| format!("  your account   {}    (e-mail and password for `{sign_in}`)\n", file.display()));
    let systemprompt = installation.programs.join("systemprompt");
    format!(
        "
The cloud is up.

  your tenant    {url}
  its health     {url}api/v1/health
  API            {api}/api/v1/health
{account}  data           {data}

Browsers and curl find these names by themselves. They do not know the CA yet; trust it once:
  curl           curl --cacert {ca} {url}
  Debian         cp {ca} /usr/local/share/ca-certificates/systemprompt-local.crt && update-ca-certificates
  browsers       import it as an authority (it can vouch for {zone}, localhost and loopback only)
Other programs may not resolve *.localhost: install libnss-myhostname, or use https://localhost:{https}/ for the API.

Next, in another terminal:
  cd {project}
  export SYSTEMPROMPT_CA_FILE={ca}
  alias systemprompt={systemprompt}
  systemprompt cloud status
  $EDITOR web/dist/index.html && systemprompt cloud deploy
  systemprompt cloud logs -f

Ctrl-C drains and stops everything; the next `cargo xtask up` goes on from here.",
        url = tenant.url,
        api = installation.url("api"),
        account = account.unwrap_or_default(),
        zone = installation.zone,
        https = installation.https,
        systemprompt = systemprompt.display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_every_figure_and_says_none_where_nothing_was_done() {
        let timings = Timings {
            phase1: Some(Duration::from_micros(321_900)),
            deploy: None,
            redeploy: Some(Duration::from_millis(900)),
            total: Some(Duration::from_secs(5)),
        };
        assert_eq!(
            last_line("https://a.z:8443/", &timings),
            "url=https://a.z:8443/ status=200 phase1_ms=321 deploy_ms=none redeploy_ms=900 total_ms=5000"
        );
    }
}
