//! What can go wrong at a driver, classified by what the caller should do next.

use std::fmt;

/// A driver's refusal or failure. The variant is the classification; the text is for people and names no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The app, instance or image does not exist (any more).
    #[error("not found: {0}")]
    NotFound(String),
    /// The call contradicts what the driver already has, for instance another image under the same deployment.
    #[error("conflict: {0}")]
    Conflict(String),
    /// There is no room; `scope` says how far one must go to find some.
    #[error("no capacity on this {scope}: {message}")]
    Capacity {
        /// What is full.
        scope: CapacityScope,
        /// What was wanted and what was left.
        message: String,
    },
    /// The request itself is wrong and will stay wrong.
    #[error("{0}")]
    Rejected(String),
    /// Something failed that may work the next time.
    #[error("{0}")]
    Transient(String),
}

/// How far a lack of capacity reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapacityScope {
    /// This host is full, another of the region may not be.
    Host,
    /// The region is full.
    Region,
}

impl fmt::Display for CapacityScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Region => "region",
        })
    }
}

/// What a caller should do about a [`DriverError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The same call again, after a pause.
    Retry,
    /// The same call on another host.
    OtherHost,
    /// The same call in another region.
    OtherRegion,
    /// Nothing: repeating cannot help.
    GiveUp,
}

impl DriverError {
    /// What to do next.
    pub fn next(&self) -> Next {
        match self {
            Self::Transient(_) => Next::Retry,
            Self::Capacity { scope: CapacityScope::Host, .. } => Next::OtherHost,
            Self::Capacity { scope: CapacityScope::Region, .. } => Next::OtherRegion,
            Self::NotFound(_) | Self::Conflict(_) | Self::Rejected(_) => Next::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_tells_what_to_do_next() {
        let capacity = |scope| DriverError::Capacity { scope, message: "full".to_owned() };
        let text = || "x".to_owned();
        for (error, next) in [
            (DriverError::Transient(text()), Next::Retry),
            (capacity(CapacityScope::Host), Next::OtherHost),
            (capacity(CapacityScope::Region), Next::OtherRegion),
            (DriverError::NotFound(text()), Next::GiveUp),
            (DriverError::Conflict(text()), Next::GiveUp),
            (DriverError::Rejected(text()), Next::GiveUp),
        ] {
            assert_eq!(error.next(), next, "{error}");
        }
    }
}
