//! Migrations are numbered without gaps: two branches that both add the next one must collide, not reorder.

use super::Finding;
use std::path::PathBuf;

/// `files` in the order they are applied.
pub(super) fn check(files: &[PathBuf]) -> Vec<Finding> {
    files
        .iter()
        .enumerate()
        .filter_map(|(index, file)| {
            let name = file.file_name()?.to_string_lossy().into_owned();
            let expected = format!("{:04}_", index + 1);
            (!name.starts_with(&expected))
                .then(|| Finding::new(format!("migrations/{name}"), format!("should begin with {expected}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_names(names: &[&str]) -> usize {
        check(&names.iter().map(PathBuf::from).collect::<Vec<_>>()).len()
    }

    #[test]
    fn gaps_and_doubles_are_found() {
        assert_eq!(check_names(&["0001_a.sql", "0002_b.sql"]), 0);
        assert_eq!(check_names(&["0001_a.sql", "0003_b.sql"]), 1);
        assert_eq!(check_names(&["0001_a.sql", "0001_b.sql"]), 1);
    }
}
