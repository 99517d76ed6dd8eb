//! What a server is told: pure, so that it can be read in one place.

use crate::{SUPERUSER, layout::Layout};

/// Who may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The superuser by peer authentication, and nobody else.
    ControlPlane,
    /// The superuser by peer authentication; every other role by SCRAM, to the database of its own name only.
    Tenants,
}

/// What an acknowledged commit survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Durability {
    /// Everything, a power cut included.
    Full,
    /// A crash of the server, not of the machine. For tests only.
    None,
}

/// The name of the ident map.
const MAP: &str = "systemprompt";

/// Small memory, no network, nothing secret in the log. Later settings win.
const BASE: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("port", "5432"),
    // A crash is recovered in a tenth of a second; the default calls fsync on every file first.
    ("recovery_init_sync_method", "syncfs"),
    ("synchronous_commit", "on"),
    ("shared_buffers", "16MB"),
    ("wal_level", "minimal"),
    ("max_wal_senders", "0"),
    ("max_wal_size", "256MB"),
    ("min_wal_size", "32MB"),
    ("autovacuum_max_workers", "2"),
    ("jit", "off"),
    ("password_encryption", "scram-sha-256"),
    ("log_destination", "stderr"),
    ("logging_collector", "off"),
    ("log_line_prefix", "%m [%p] "),
    // `ALTER ROLE … PASSWORD '…'` that fails must not leave the password in the log.
    ("log_statement", "none"),
    ("log_min_error_statement", "panic"),
    ("log_min_duration_statement", "-1"),
];

impl Access {
    /// `pg_hba.conf`. The first line that matches decides; what matches none is refused.
    pub(crate) fn hba(self) -> String {
        let superuser = format!("local all {SUPERUSER} peer map={MAP}\n");
        match self {
            Self::ControlPlane => superuser,
            // `sameuser`: the database has the role's name. The superuser's line stands first and has no password.
            Self::Tenants => format!("{superuser}local sameuser all scram-sha-256\n"),
        }
    }

    /// Mode bits of the directory the socket lies in, and of the socket.
    pub(crate) const fn socket_modes(self) -> SocketModes {
        match self {
            Self::ControlPlane => SocketModes { directory: 0o700, socket: "0700" },
            // Sandboxes run as users of their own: they pass through, but cannot list.
            Self::Tenants => SocketModes { directory: 0o711, socket: "0777" },
        }
    }

    /// Tenants can raise any number of lower messages, and what is logged lies on everybody's disk.
    const fn least_logged(self) -> &'static str {
        match self {
            Self::ControlPlane => "warning",
            Self::Tenants => "fatal",
        }
    }

    const fn connections(self) -> &'static str {
        match self {
            Self::ControlPlane => "60",
            Self::Tenants => "200",
        }
    }
}

/// See [`Access::socket_modes`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SocketModes {
    pub(crate) directory: u32,
    pub(crate) socket: &'static str,
}

/// `pg_ident.conf`: only the user that starts the cluster is its superuser.
pub(crate) fn ident(invoker: &str) -> String {
    format!("{MAP} \"{}\" {SUPERUSER}\n", invoker.replace('"', ""))
}

/// The server's arguments behind its name.
pub(crate) fn arguments(
    layout: &Layout,
    access: Access,
    durability: Durability,
    extra: &[(String, String)],
) -> Vec<String> {
    let mut settings: Vec<(&str, String)> = BASE.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    settings.push(("unix_socket_directories", layout.socket_dir.display().to_string()));
    settings.push(("hba_file", layout.hba().display().to_string()));
    settings.push(("ident_file", layout.ident().display().to_string()));
    settings.push(("log_min_messages", access.least_logged().to_owned()));
    settings.push(("unix_socket_permissions", access.socket_modes().socket.to_owned()));
    settings.push(("max_connections", access.connections().to_owned()));
    let durable = match durability {
        Durability::Full => "on",
        Durability::None => "off",
    };
    // synchronous_commit stays on: a commit reaches the kernel, and so survives the death of the server.
    for name in ["fsync", "full_page_writes"] {
        settings.push((name, durable.to_owned()));
    }
    settings.extend(extra.iter().map(|(name, value)| (name.as_str(), value.clone())));
    settings.into_iter().flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_the_callers_and_durability_is_on_by_default() {
        let extra = [("max_connections".to_owned(), "7".to_owned())];
        let layout = Layout { data: "/d".into(), socket_dir: "/run/x".into() };
        let all = arguments(&layout, Access::ControlPlane, Durability::Full, &extra);
        let position = |text: &str| all.iter().rposition(|argument| argument == text);
        assert!(position("max_connections=7") > position("max_connections=60"));
        for expected in ["fsync=on", "full_page_writes=on", "listen_addresses="] {
            assert!(position(expected).is_some(), "{expected}");
        }
    }

    #[test]
    fn only_the_tenants_cluster_knows_passwords() {
        assert_eq!(Access::ControlPlane.hba(), "local all systemprompt peer map=systemprompt\n");
        assert_eq!(
            Access::Tenants.hba(),
            "local all systemprompt peer map=systemprompt\nlocal sameuser all scram-sha-256\n"
        );
        assert_eq!(ident("root"), "systemprompt \"root\" systemprompt\n");
    }
}
