//! What the sandbox is made of: a value that can be looked at and tested before anything runs.

use super::{Bind, launcher::STAGE};
use crate::DriverError;
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};
use systemprompt_contract::Secret;
use systemprompt_oci::ImageConfig;

/// Uid and gid that the app sees; which kernel uid is behind them differs from app to app.
const INSIDE_UID: &str = "10001";
/// Most variables an instance may have.
const MAX_VARIABLES: usize = 1000;
/// Where the app's volume is.
pub(crate) const VOLUME: &str = "/app/storage";
/// The generated resolver configuration.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Paths of the host that the sandbox shows.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) image: PathBuf,
    pub(crate) storage: PathBuf,
    pub(crate) resolv_conf: PathBuf,
    pub(crate) binds: Vec<Bind>,
}

/// How the sandbox names its sources: as they are, or as the launcher shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    Direct,
    Staged,
}

impl Sources {
    /// What the launcher has to show, and under which names.
    pub(crate) fn staged(&self) -> Vec<(PathBuf, String)> {
        let mut staged = vec![
            (self.image.clone(), "image".to_owned()),
            (self.storage.clone(), "storage".to_owned()),
            (self.resolv_conf.clone(), "resolv.conf".to_owned()),
        ];
        staged.extend(self.binds.iter().enumerate().map(|(at, bind)| (bind.host.clone(), format!("bind{at}"))));
        staged
    }

    /// Options of bwrap. `memory_bytes` bounds the temporary file systems, which live in memory.
    pub(crate) fn options(
        &self,
        naming: Naming,
        working_directory: &str,
        memory_bytes: u64,
    ) -> Result<Vec<String>, DriverError> {
        let name = |path: &PathBuf, staged: &str| match naming {
            Naming::Staged => Ok(format!("{STAGE}/{staged}")),
            Naming::Direct => path
                .to_str()
                .map(str::to_owned)
                .ok_or_else(|| DriverError::Rejected(format!("expected a path in UTF-8, got {}", path.display()))),
        };
        let half = (memory_bytes / 2).to_string();
        let mut options: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| options.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["--unshare-user", "--uid", INSIDE_UID, "--gid", INSIDE_UID, "--disable-userns"]);
        add(&["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "app"]);
        add(&["--ro-bind", &name(&self.image, "image")?, "/", "--proc", "/proc", "--dev", "/dev"]);
        add(&["--size", &half, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]);
        add(&["--size", &half, "--perms", "1777", "--tmpfs", "/tmp"]);
        add(&["--size", "1048576", "--perms", "0755", "--tmpfs", "/run"]);
        add(&["--bind", &name(&self.storage, "storage")?, VOLUME]);
        add(&["--ro-bind", &name(&self.resolv_conf, "resolv.conf")?, RESOLV_CONF]);
        for (at, bind) in self.binds.iter().enumerate() {
            let target = bind.sandbox.to_str().ok_or_else(|| {
                DriverError::Rejected(format!("expected a path in UTF-8, got {}", bind.sandbox.display()))
            })?;
            add(&["--ro-bind", &name(&bind.host, &format!("bind{at}"))?, target]);
        }
        add(&["--remount-ro", "/run"]);
        add(&["--chdir", if working_directory.is_empty() { "/" } else { working_directory }]);
        match options.iter().find(|option| option.contains('\0')) {
            Some(option) => Err(DriverError::Rejected(format!("expected a path without NUL, got {option:?}"))),
            None => Ok(options),
        }
    }
}

/// The environment: the image's, beaten by the deployment's, beaten by where to listen.
pub(crate) fn environment(
    image: &ImageConfig,
    deployment: &BTreeMap<String, Secret>,
    listen: SocketAddr,
) -> Result<BTreeMap<String, Secret>, DriverError> {
    let mut environment = BTreeMap::new();
    for variable in &image.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        environment.insert(name.to_owned(), Secret::new(value));
    }
    environment.extend(deployment.iter().map(|(name, value)| (name.clone(), value.clone())));
    environment.insert("HOST".to_owned(), Secret::new(listen.ip().to_string()));
    environment.insert("PORT".to_owned(), Secret::new(listen.port().to_string()));
    if environment.len() > MAX_VARIABLES {
        let count = environment.len();
        return Err(DriverError::Rejected(format!("expected at most {MAX_VARIABLES} variables, got {count}")));
    }
    match environment.iter().find(|(name, value)| !is_variable(name, value)) {
        Some((name, _)) => Err(DriverError::Rejected(format!(
            "expected a variable with a name without '=' and NUL and a value without NUL of at most 128 KiB, got one named {name:?}"
        ))),
        None => Ok(environment),
    }
}

fn is_variable(name: &str, value: &Secret) -> bool {
    !name.is_empty()
        && !name.contains(['=', '\0'])
        && !value.expose().contains('\0')
        && name.len() + value.expose().len() < 128 << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        Sources {
            image: "/data/images/x/root".into(),
            storage: "/data/apps/a/storage".into(),
            resolv_conf: "/data/apps/a/resolv.conf".into(),
            binds: vec![Bind { host: "/data/pg".into(), sandbox: "/run/postgresql".into() }],
        }
    }

    #[test]
    fn the_image_is_read_only_and_only_the_volume_is_not() {
        let options = sources().options(Naming::Staged, "", 256 << 20).expect("options").join(" ");
        assert!(options.contains("--ro-bind /mnt/image /"));
        assert_eq!(options.matches(" --bind ").count(), 1, "{options}");
        assert!(options.contains("--bind /mnt/storage /app/storage"));
        assert!(options.contains("--ro-bind /mnt/bind0 /run/postgresql"));
        assert!(options.find("--tmpfs /run").expect("run") < options.find("/run/postgresql").expect("bind"));
        assert!(options.ends_with("--chdir /"));
        assert!(!options.contains("/data"), "a path of the host is nobody's business");
    }

    #[test]
    fn a_working_directory_cannot_add_options() {
        let options = sources().options(Naming::Staged, "/\0--bind\0/\0/host", 256 << 20);
        assert!(matches!(options, Err(DriverError::Rejected(_))), "{options:?}");
    }

    #[test]
    fn the_driver_beats_the_deployment_and_that_beats_the_image() {
        let image = ImageConfig { env: vec!["A=1".into(), "B=1".into(), "PORT=1".into()], ..ImageConfig::default() };
        let deployment = BTreeMap::from([("B".to_owned(), Secret::new("2")), ("HOST".to_owned(), Secret::new("evil"))]);
        let listen = SocketAddr::from(([0, 0, 0, 0], 8080));
        let found = environment(&image, &deployment, listen).expect("environment");
        let found: Vec<_> = found.iter().map(|(name, value)| format!("{name}={}", value.expose())).collect();
        assert_eq!(found, ["A=1", "B=2", "HOST=0.0.0.0", "PORT=8080"]);
        for (name, value) in [("", "x"), ("a=b", "x"), ("a\0", "x"), ("a", "x\0")] {
            let bad = BTreeMap::from([(name.to_owned(), Secret::new(value))]);
            assert!(environment(&ImageConfig::default(), &bad, listen).is_err(), "{name:?}");
        }
    }
}
