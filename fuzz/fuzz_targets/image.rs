//! What a push brings: no manifest, configuration or layer panics, and a layer is not larger than its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use systemprompt_oci::{Descriptor, Digest, ImageConfig, Manifest, StoredLayer, inspect_layer, media_type};

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    let media_type = match kind % 5 {
        0 => return drop(Manifest::parse(bytes)),
        1 => return drop(ImageConfig::parse(bytes).map(|config| config.command())),
        2 => media_type::OCI_LAYER,
        3 => media_type::OCI_LAYER_GZIP,
        _ => media_type::OCI_LAYER_ZSTD,
    };
    // One process, one input at a time.
    let path = PathBuf::from(format!("/dev/shm/systemprompt-fuzz-{}", std::process::id()));
    std::fs::write(&path, bytes).expect("room for the layer");
    let digest = Digest::of(bytes);
    let descriptor = Descriptor::new(media_type, digest, bytes.len() as u64);
    if let Ok(facts) = inspect_layer(&StoredLayer { descriptor, diff_id: digest, path: path.clone() }) {
        assert!(facts.unpacked_size <= 64 << 20);
    }
    std::fs::remove_file(path).expect("the layer's file");
});
