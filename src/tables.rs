//! The tables of `docs/` that say what the code says: reasons, restarts, outages and metrics, and in what the image server
//! differs from ovirt-imageio. Pure: `generate` puts them in.

use std::fmt::Write as _;

use serde::Deserialize;

use crate::metrics::Metric;
use crate::outage::{self, End, Moment, Outage};
use crate::reason::{Reason, Retry};
use crate::step::{Scene, Step};

/// What stands before and after a table in its page.
const MARKS: (&str, &str) =
    ("<!-- made by `cargo run --bin generate`: do not edit -->\n", "<!-- end of what is made -->\n");

/// Every table, by its page.
pub fn all() -> Vec<(&'static str, String)> {
    vec![("reasons", reasons()), ("restarts", restarts()), ("outages", outages()), ("metrics", metrics())]
}

fn reasons() -> String {
    let mut table =
        "| Reason | Told of | What it means | Waits | What to do |\n|---|---|---|---|---|\n".to_owned();
    for reason in Reason::ALL {
        let waits = if reason.retry() == Retry::Wait { "yes" } else { "no" };
        // writing to a String does not fail
        let _ = writeln!(
            table,
            "| `{reason}` | {} | {} | {waits} | {} |",
            reason.kinds(),
            reason.meaning(),
            reason.next_step()
        );
    }
    table
}

fn metrics() -> String {
    let mut table = "| Metric | Kind | Labels | Told by | What it says |\n|---|---|---|---|---|\n".to_owned();
    for metric in Metric::ALL {
        let labels: Vec<_> = metric.labels().iter().map(|label| format!("`{label}`")).collect();
        // writing to a String does not fail
        let _ = writeln!(
            table,
            "| `{metric}` | {} | {} | {} | {} |",
            metric.kind(),
            labels.join(", "),
            metric.by(),
            metric.help()
        );
    }
    table
}

fn restarts() -> String {
    let mut table =
        "| Of | who dies | after | The successor finds | and |\n|---|---|---|---|---|\n".to_owned();
    for step in Step::ALL {
        let of = match step.scene() {
            Scene::Backup => "a backup",
            Scene::Removal => "a checkpoint's deletion",
            Scene::HandOver => "a hand-over",
        };
        let who = format!("{:?}", step.component()).to_lowercase();
        let _ = writeln!(table, "| {of} | {who} | {} | {} | {} |", step.done(), step.finds(), step.does());
    }
    table
}

/// What readers are told of a deliberate difference; the rest of it is for `tests/conformance`.
#[derive(Deserialize)]
struct Difference {
    id: String,
    what: String,
    stock: String,
    ours: String,
    why: String,
}

/// The table of deliberate differences from ovirt-imageio, from the text of `tests/conformance/differences.yaml`.
///
/// # Errors
/// When the text is no list of them.
pub fn conformance(differences: &str) -> Result<String, serde_saphyr::Error> {
    let differences: Vec<Difference> = serde_saphyr::from_str(differences)?;
    let mut table = "| Difference | ovirt-imageio 2.5.1 | Virtmark | Why |\n|---|---|---|---|\n".to_owned();
    for Difference { id, what, stock, ours, why } in differences {
        // writing to a String does not fail
        let _ = writeln!(table, "| {what} (`{id}`) | {stock} | {ours} | {why} |");
    }
    Ok(table)
}

fn outages() -> String {
    let heads: Vec<_> = Outage::ALL.iter().map(|outage| outage.words()).collect();
    let mut table =
        format!("| The backup is | {} |\n|{}\n", heads.join(" | "), "---|".repeat(heads.len() + 1));
    for &moment in Moment::ALL {
        let cells = Outage::ALL.iter().map(|&outage| match outage::end(moment, outage) {
            End::Natural => moment.natural().to_owned(),
            End::Waits(reason) => format!("waits `{reason}`, then {}", moment.natural()),
            End::Fails(reason) => format!("Failed `{reason}`"),
        });
        let _ = writeln!(table, "| {} | {} |", moment.words(), cells.collect::<Vec<_>>().join(" | "));
    }
    table
}

/// `page` with `table` between its marks; `None` when it has none.
pub fn put(page: &str, table: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKS.0)?;
    let (_, after) = rest.split_once(MARKS.1)?;
    Some(format!("{before}{}{table}{}{after}", MARKS.0, MARKS.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_replaces_the_old_one_and_nothing_else() {
        let page = format!("# a\n{}old\n{}tail\n", MARKS.0, MARKS.1);
        let new = put(&page, "new\n").unwrap();
        assert_eq!(new, format!("# a\n{}new\n{}tail\n", MARKS.0, MARKS.1));
        assert_eq!(put(&new, "new\n"), Some(new));
        assert_eq!(put("# no place", "new\n"), None);
    }

    #[test]
    fn no_cell_breaks_its_row() {
        let differences = include_str!("../tests/conformance/differences.yaml");
        let conformance = ("conformance", conformance(differences).unwrap());
        for (name, table) in all().into_iter().chain([conformance]) {
            let columns = |line: &str| line.matches('|').count();
            let expected = table.lines().next().map(columns);
            assert!(table.lines().all(|line| Some(columns(line)) == expected), "{name}");
        }
    }
}
