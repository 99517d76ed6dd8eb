use systemprompt_contract::IMAGE_REPOSITORY;
use systemprompt_oci::Digest;
use uuid::Uuid;

/// What a path means. There is one repository; every other name is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v2/`
    Root,
    /// `/v2/NAME/tags/list`
    Tags,
    /// `/v2/NAME/blobs/DIGEST`; none: no digest, so no such blob.
    Blob(Option<Digest>),
    /// `/v2/NAME/manifests/REFERENCE`
    Manifest(Reference),
    /// `/v2/NAME/blobs/uploads/`
    Uploads,
    /// `/v2/NAME/blobs/uploads/ID`; none: no id of ours, so no such upload.
    Upload(Option<Uuid>),
    /// Anything else.
    Unknown,
}

/// How a manifest is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reference {
    Digest(Digest),
    Tag(String),
}

impl Endpoint {
    pub(super) fn parse(path: &str) -> Self {
        let Some(rest) = path.strip_prefix("/v2") else { return Self::Unknown };
        if matches!(rest, "" | "/") {
            return Self::Root;
        }
        let below = rest.strip_prefix('/').and_then(|rest| rest.strip_prefix(IMAGE_REPOSITORY));
        let Some(below) = below.and_then(|below| below.strip_prefix('/')) else { return Self::Unknown };
        let parts: Vec<&str> = below.split('/').collect();
        match parts[..] {
            ["tags", "list"] => Self::Tags,
            ["blobs", "uploads"] | ["blobs", "uploads", ""] => Self::Uploads,
            ["blobs", "uploads", id] => Self::Upload(upload_id(id)),
            ["blobs", digest] => Self::Blob(digest.parse().ok()),
            ["manifests", reference] => Self::Manifest(Reference::parse(reference)),
            _ => Self::Unknown,
        }
    }
}

impl Reference {
    fn parse(text: &str) -> Self {
        match text.parse() {
            Ok(digest) => Self::Digest(digest),
            Err(_) => Self::Tag(text.to_owned()),
        }
    }
}

/// Only the spelling that was given out: the id is a file name.
fn upload_id(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|id| id.hyphenated().to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_means_one_thing() {
        let digest = Digest::of(b"x");
        let upload = Uuid::new_v4();
        let name = IMAGE_REPOSITORY;
        for (path, expected) in [
            ("/v2".to_owned(), Endpoint::Root),
            ("/v2/".to_owned(), Endpoint::Root),
            (format!("/v2/{name}/tags/list"), Endpoint::Tags),
            (format!("/v2/{name}/blobs/{digest}"), Endpoint::Blob(Some(digest))),
            (format!("/v2/{name}/blobs/sha512:00"), Endpoint::Blob(None)),
            (format!("/v2/{name}/blobs/uploads/"), Endpoint::Uploads),
            (format!("/v2/{name}/blobs/uploads/{upload}"), Endpoint::Upload(Some(upload))),
            (format!("/v2/{name}/blobs/uploads/{}", upload.simple()), Endpoint::Upload(None)),
            (format!("/v2/{name}/blobs/uploads/../{digest}"), Endpoint::Unknown),
            (format!("/v2/{name}/blobs/uploads/%2e%2e"), Endpoint::Upload(None)),
            (format!("/v2/{name}/manifests/{digest}"), Endpoint::Manifest(Reference::Digest(digest))),
            (format!("/v2/{name}/manifests/latest"), Endpoint::Manifest(Reference::Tag("latest".into()))),
            (format!("/v2/{name}x/tags/list"), Endpoint::Unknown),
            (format!("/v2/other/{name}/tags/list"), Endpoint::Unknown),
            ("/v2/_catalog".to_owned(), Endpoint::Unknown),
            (format!("/v2/{name}/referrers/{digest}"), Endpoint::Unknown),
            ("/v1/".to_owned(), Endpoint::Unknown),
        ] {
            assert_eq!(Endpoint::parse(&path), expected, "{path}");
        }
    }
}
