//! Every id is a type of its own, so that a deployment can never be passed where a tenant is meant.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

/// Text that is not a UUID of version 4.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a UUID such as 999bc654-9a64-49bc-98be-db976fc84e76, got {0:?}")]
pub struct InvalidId(pub String);

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random id (UUID v4: v7 would put the clock into the first twelve hex digits).
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self { Self(Uuid::new_v4()) }
            /// The id as stored in PostgreSQL.
            pub const fn uuid(self) -> Uuid { self.0 }
            /// Wraps an id read back from PostgreSQL.
            pub const fn from_uuid(uuid: Uuid) -> Self { Self(uuid) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.hyphenated().fmt(f) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.hyphenated().fmt(f) }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                // Only the canonical form: one id has one spelling, in paths, tags and logs.
                match Uuid::try_parse(text) {
                    Ok(uuid) if uuid.hyphenated().to_string() == text => Ok(Self(uuid)),
                    _ => Err(InvalidId(text.chars().take(64).collect())),
                }
            }
        }
    };
}

id!(/// A tenant: one customer's instance. Always UUID v4.
    TenantId);
id!(/// A person who can sign in.
    AccountId);
id!(/// One checkout, from "wants to buy" to "provisioned".
    CheckoutId);
id!(/// One deploy of one tenant; also names the release it makes.
    DeploymentId);
id!(/// One durable operation of the workflow engine.
    OperationId);
id!(/// One request at the edge or the API; printed in error answers and logs.
    RequestId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_has_one_spelling() {
        let text = "999bc654-9a64-49bc-98be-db976fc84e76";
        assert_eq!(text.parse::<TenantId>().expect("canonical").to_string(), text);
        for other in [
            "999BC654-9A64-49BC-98BE-DB976FC84E76",
            "999bc6549a6449bc98bedb976fc84e76",
            "{999bc654-9a64-49bc-98be-db976fc84e76}",
            "",
            "x",
        ] {
            assert!(other.parse::<TenantId>().is_err(), "{other}");
        }
    }
}
