//! Listening sockets: one for each worker and address, and an error that helps when one is taken.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
};
use tokio::net::TcpSocket;

/// Pending connections the kernel keeps for one listener.
const BACKLOG: u32 = 4096;

/// Why an edge cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address} for {purpose}: {source}{}; choose another with {option}",
        holder.as_ref().map(|holder| format!(" (held by {holder})")).unwrap_or_default()
    )]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// `HTTPS` or `HTTP`.
        purpose: &'static str,
        /// The option that changes it.
        option: &'static str,
        /// The process that listens there, as `name (pid 123)`, when it can be told.
        holder: Option<String>,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Https,
    Http,
}

/// The listeners of one address, one for each worker.
pub(crate) fn listen(purpose: Purpose, address: SocketAddr, workers: usize) -> Result<Vec<TcpListener>, BindError> {
    let failed = |source: io::Error| {
        let (purpose, option) = match purpose {
            Purpose::Https => ("HTTPS", "--https PORT"),
            Purpose::Http => ("HTTP", "--http PORT"),
        };
        let taken = source.kind() == io::ErrorKind::AddrInUse;
        BindError::Listen { address, purpose, option, holder: taken.then(|| holder(address.port())).flatten(), source }
    };
    // Another process with SO_REUSEPORT would share the port with us silently: a socket without it finds out.
    drop(socket(address, Sharing::Alone).map_err(failed)?);
    let first = socket(address, Sharing::AmongWorkers).map_err(failed)?;
    let bound = first.local_addr().map_err(failed)?;
    let mut listeners = vec![first];
    while listeners.len() < workers {
        listeners.push(socket(bound, Sharing::AmongWorkers).map_err(failed)?);
    }
    Ok(listeners)
}

#[derive(Clone, Copy, PartialEq)]
enum Sharing {
    Alone,
    AmongWorkers,
}

fn socket(address: SocketAddr, sharing: Sharing) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // `[::]` and `0.0.0.0` can then be listened on side by side.
        rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if sharing == Sharing::AmongWorkers {
        socket.set_reuseport(true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

/// Who listens on a port, as far as `/proc` tells (own processes; all of them for root).
fn holder(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|table| listening_inode(&table, port).map(str::to_owned))?;
    let wanted = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let owns = |entry: fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == &*wanted);
        fs::read_dir(process.path().join("fd")).ok()?.flatten().any(owns).then(|| {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            format!("{} (pid {pid})", name.trim())
        })
    })
}

/// The inode of the socket that listens (state `0A`) on a port, from the text of `/proc/net/tcp`.
fn listening_inode(table: &str, port: u16) -> Option<&str> {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (local, state) = (fields.nth(1)?, fields.nth(1)?);
        (local.ends_with(&suffix) && state == "0A").then(|| fields.nth(5)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_listener_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 111 1\n   \
            1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1\n";
        assert_eq!(listening_inode(table, 8080), Some("222"));
        assert_eq!(listening_inode(table, 8081), None);
    }
}
