use std::path::PathBuf;

/// How the client reaches the cloud.
#[derive(Debug, Clone, Default)]
pub struct HttpOptions {
    /// A PEM bundle of further certificate authorities (`SYSTEMPROMPT_CA_FILE`), e.g. the one of a local cloud.
    pub ca_file: Option<PathBuf>,
}

/// Why no HTTP client could be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The CA file cannot be read.
    #[error("cannot read the CA file {}", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The CA file holds no certificate, or TLS cannot be set up.
    #[error(transparent)]
    Client(#[from] systemprompt_oci::HttpClientError),
}

/// The HTTP client of the command line: the machine's authorities and those of `ca_file`, `*.localhost` resolved
/// without DNS, ten seconds to connect; limits on whole exchanges are set where a call is made.
///
/// # Errors
/// [`HttpError`] when the CA file cannot be read or TLS cannot be set up; never panics.
pub fn http_client(options: &HttpOptions) -> Result<reqwest::Client, HttpError> {
    let pem = match &options.ca_file {
        Some(path) => std::fs::read(path).map_err(|source| HttpError::CaFile { path: path.clone(), source })?,
        None => Vec::new(),
    };
    Ok(systemprompt_oci::http_client(&pem)?)
}
