//! Lists for people and for programs: tables, JSON, YAML, names. Pure: it answers text, and prints nothing.

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

/// How a list is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table
    #[default]
    Table,
    /// A table with more columns
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// Names only, one a line
    Name,
}

/// A list: its columns, and for each thing its cells. The first is the name; those from `narrow` on are shown with `-o wide`.
pub struct List<'a> {
    /// Headers of the columns.
    pub columns: &'a [&'a str],
    /// How many of them a table that is not wide has.
    pub narrow: usize,
    /// The cells of each thing.
    pub rows: Vec<Vec<String>>,
    /// All of it, for programs.
    pub value: Value,
}

impl List<'_> {
    /// The list as text.
    #[must_use]
    pub fn text(&self, output: Output) -> String {
        match output {
            Output::Json => with_end(serde_json::to_string_pretty(&self.value).unwrap_or_default()),
            Output::Yaml => with_end(serde_saphyr::to_string(&self.value).unwrap_or_default()),
            Output::Name => {
                let names = self.rows.iter().filter_map(|row| row.first());
                names.map(|name| format!("{name}\n")).collect()
            }
            Output::Table => self.table(self.narrow),
            Output::Wide => self.table(self.columns.len()),
        }
    }

    fn table(&self, columns: usize) -> String {
        let head: Vec<String> = self.columns.iter().map(|&column| column.to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(&self.rows).collect();
        let width = |column: usize| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let line = |cells: &&Vec<String>| {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            format!("{}\n", padded.collect::<Vec<_>>().join("   ").trim_end())
        };
        lines.iter().map(line).collect()
    }
}

fn with_end(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// A value as JSON's own; nothing where it cannot be.
#[must_use]
pub fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form() {
        let rows = vec![vec!["db01-1", "Full", "1.0 MiB"], vec!["db", "Incremental", ""]];
        let rows = rows.into_iter().map(|row| row.into_iter().map(str::to_owned).collect()).collect();
        let list = List {
            columns: &["NAME", "TYPE", "SIZE"],
            narrow: 2,
            rows,
            value: serde_json::json!([{"a": 1}]),
        };
        for (output, text) in [
            (Output::Table, "NAME     TYPE\ndb01-1   Full\ndb       Incremental\n"),
            (
                Output::Wide,
                "NAME     TYPE          SIZE\ndb01-1   Full          1.0 MiB\ndb       Incremental\n",
            ),
            (Output::Name, "db01-1\ndb\n"),
            (Output::Json, "[\n  {\n    \"a\": 1\n  }\n]\n"),
            (Output::Yaml, "- a: 1\n"),
        ] {
            assert_eq!(list.text(output), text, "{output:?}");
        }
    }
}
