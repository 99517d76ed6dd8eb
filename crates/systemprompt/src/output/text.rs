use super::escape::escaped;
use std::fmt::Display;

/// Text for people, every part escaped.
#[derive(Debug, Default)]
pub(crate) struct Text(String);

impl Text {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn line(&mut self, text: impl Display) {
        self.0.push_str(&escaped(&text.to_string()));
        self.0.push('\n');
    }

    /// `label: value`, aligned for labels of up to eleven characters; nothing where there is no value.
    pub(crate) fn pair(&mut self, label: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            let label = format!("{label}:");
            self.line(format!("{label:<13}{value}"));
        }
    }

    /// Columns as wide as their widest cell.
    pub(crate) fn table<const N: usize>(&mut self, headers: [&str; N], rows: &[[String; N]]) {
        let rows: Vec<[String; N]> =
            rows.iter().map(|row| std::array::from_fn(|column| escaped(&row[column]).into_owned())).collect();
        let headers = headers.map(str::to_owned);
        let all = || std::iter::once(&headers).chain(&rows);
        let widths: [usize; N] =
            std::array::from_fn(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0));
        for row in all() {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            self.0.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            self.0.push('\n');
        }
    }
}

/// `1.5 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::Text;

    #[test]
    fn a_table_is_aligned_and_escaped() {
        let mut text = Text::default();
        text.table(["ID", "NAME"], &[["a".to_owned(), "x\u{1b}[2J\ny".to_owned()], ["long".to_owned(), String::new()]]);
        assert_eq!(text.as_str(), "ID    NAME\na     x\\u{1b}[2J\\ny\nlong\n");
    }
}
