//! TLS towards clients: TLS 1.2 and 1.3, the certificate by SNI, `h2` and `http/1.1` by ALPN.

use crate::certs::{CertTable, Served};
use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};
use systemprompt_contract::Hostname;

/// Whom a client asked for in its handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sni {
    /// No name, an address, or `localhost`: good for the platform only.
    Unnamed,
    /// A host.
    Host(Hostname),
    /// Something that is not a host name; no certificate is shown.
    Invalid,
}

impl Sni {
    pub(crate) fn parse(name: Option<&str>) -> Self {
        // rustls reports addresses, which RFC 6066 does not allow, as no name at all.
        match name.map(Hostname::from_authority) {
            None => Self::Unnamed,
            Some(Ok(host)) if host.as_str() == "localhost" => Self::Unnamed,
            Some(Ok(host)) => Self::Host(host),
            Some(Err(_)) => Self::Invalid,
        }
    }
}

impl CertTable {
    /// The certificate shown for an SNI.
    pub(crate) fn for_sni(&self, sni: &Sni) -> Option<&Arc<Served>> {
        match sni {
            Sni::Unnamed => Some(self.platform()),
            Sni::Host(host) => self.find(host),
            Sni::Invalid => None,
        }
    }
}

/// Reads the certificate table that is in force when the client's hello arrives.
pub(crate) struct Resolver {
    pub(crate) table: Arc<ArcSwap<CertTable>>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let sni = Sni::parse(hello.server_name());
        self.table.load().for_sni(&sni).map(|served| Arc::clone(&served.key))
    }
}

/// The configuration all workers share.
///
/// # Errors
/// When the system gives no random bytes for the ticket keys.
pub(crate) fn server_config(table: Arc<ArcSwap<CertTable>>) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Resolver { table }));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    // One ticket is enough for a resumption; each costs a write of its own in the handshake.
    config.send_tls13_tickets = 1;
    Ok(config)
}
