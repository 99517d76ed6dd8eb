/// File names that hold credentials: the builder leaves them out, the registry refuses layers that hold one.
pub const NEVER_IN_AN_IMAGE: [&str; 3] = ["credentials.json", "tenants.json", "secrets.json"];

/// Whether a file or folder of this name (one part of a path) must never be in an image. ASCII case is ignored, since
/// a project may come from a disk that ignores it too.
pub fn is_never_in_an_image(file_name: &[u8]) -> bool {
    NEVER_IN_AN_IMAGE.iter().any(|name| file_name.eq_ignore_ascii_case(name.as_bytes()))
}
