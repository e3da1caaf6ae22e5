//! The dashboard and the alerts name metrics that exist, and leave none out.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use serde_json::Value;
use virtmark::metrics::{Kind, Metric};

use super::alerts;

pub const DASHBOARD: &str = "charts/virtmark/files/dashboard.json";

/// Every query of the dashboard, with its panel's title.
pub fn queries() -> Result<Vec<(String, String)>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(DASHBOARD)?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let queries = panels.iter().flat_map(|panel| {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (text(&panel["title"]), text(&target["expr"])))
    });
    Ok(queries.collect())
}

#[test]
fn every_metric_is_shown_and_no_other() -> Result<()> {
    let mut known: Vec<String> = Vec::new();
    for metric in Metric::ALL {
        match metric.kind() {
            Kind::Histogram => known.push(format!("{metric}_bucket")),
            _ => known.push(metric.name().to_owned()),
        }
    }
    let name = Regex::new("virtmark_[a-z_]+")?;
    let shown = queries()?;
    let named = |text: &str| name.find_iter(text).map(|found| found.as_str().to_owned()).collect::<Vec<_>>();
    for (title, query) in shown.iter().chain(&alerts::all()?) {
        for metric in named(query) {
            ensure!(known.contains(&metric), "{title}: there is no {metric}");
        }
    }
    for metric in known {
        ensure!(shown.iter().any(|(_, query)| named(query).contains(&metric)), "no panel shows {metric}");
    }
    Ok(())
}

#[test]
fn panels_have_titles_words_units_and_places_of_their_own() -> Result<()> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(DASHBOARD)?)?;
    let mut taken = std::collections::HashSet::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        let title = panel["title"].as_str().context("no title")?;
        let place = &panel["gridPos"];
        let at = |key: &str| place[key].as_u64().with_context(|| format!("{title}: no {key}"));
        for (x, y) in (at("x")?..at("x")? + at("w")?).flat_map(|x| {
            let (from, to) = (at("y").unwrap_or_default(), at("h").unwrap_or_default());
            (from..from + to).map(move |y| (x, y))
        }) {
            ensure!(x < 24 && taken.insert((x, y)), "{title} covers another panel");
        }
        if panel["type"] != "row" {
            ensure!(
                panel["description"].as_str().is_some_and(|words| words.len() > 5),
                "{title}: no description"
            );
            ensure!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}: no unit");
        }
    }
    Ok(())
}
