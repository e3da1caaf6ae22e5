//! What a process counts, and how it is told to Prometheus: counters and histograms that are kept, and the gauges of one
//! scrape, which others compute from what they know.
//!
//! It reads nothing of the world, and decides nothing. [`metric`] is the list of all metrics, [`requests`] counts those to the
//! API server.

pub mod metric;
pub mod requests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

pub use metric::{By, Kind, Metric};

/// The type of the text that [`Metrics::text`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// The value of one series at one scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Of which metric: a gauge or a counter.
    pub metric: Metric,
    /// The values of its labels, in their order.
    pub values: Vec<String>,
    /// How much.
    pub value: f64,
}

impl Sample {
    /// A value of `metric` for these values of its labels.
    pub fn new<const N: usize>(metric: Metric, values: [&str; N], value: f64) -> Self {
        Self { metric, values: values.map(str::to_owned).to_vec(), value }
    }

    /// A count. Those beyond 2^53 are rounded, as all numbers of Prometheus are.
    #[allow(clippy::cast_precision_loss, reason = "Prometheus knows no other number")]
    pub fn count<const N: usize>(metric: Metric, values: [&str; N], count: u64) -> Self {
        Self::new(metric, values, count as f64)
    }
}

/// What one process counts.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    told: Family<Labels, Counter>,
    ended: Family<Labels, Counter>,
    errors: Family<Labels, Counter>,
    reconciles: Histograms,
    freezes: Histogram,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Nothing counted yet. A freeze is counted by agents only.
    pub fn new(by: By) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            told: Family::default(),
            ended: Family::default(),
            errors: Family::default(),
            reconciles: Family::new_with_constructor(|| histogram(Metric::Reconcile)),
            freezes: histogram(Metric::Freeze),
        };
        let registry = &mut metrics.registry;
        let counted = [
            (Metric::ApiRequests, &metrics.requests),
            (Metric::Told, &metrics.told),
            (Metric::Ended, &metrics.ended),
            (Metric::ReconcileErrors, &metrics.errors),
        ];
        for (metric, family) in counted {
            registry.register(base_name(metric), help(metric), family.clone());
        }
        registry.register(base_name(Metric::Reconcile), help(Metric::Reconcile), metrics.reconciles.clone());
        if by == By::Agent {
            registry.register(base_name(Metric::Freeze), help(Metric::Freeze), metrics.freezes.clone());
        }
        metrics
    }

    /// A request to the API server was answered, or not at all.
    pub fn requested(&self, verb: &str, resource: &str, code: &str) {
        self.requests.get_or_create(&labels(Metric::ApiRequests, [verb, resource, code])).inc();
    }

    /// An Event was told of an object of this kind.
    pub fn told(&self, kind: &str, reason: &str, warning: bool) {
        let type_ = if warning { "Warning" } else { "Normal" };
        self.told.get_or_create(&labels(Metric::Told, [kind, reason, type_])).inc();
    }

    /// A backup was ended: its type, and the phase and reason that it ended with.
    pub fn ended(&self, type_: &str, phase: &str, reason: &str) {
        self.ended.get_or_create(&labels(Metric::Ended, [type_, phase, reason])).inc();
    }

    /// A guest was thawed after this time.
    pub fn thawed(&self, after: Duration) {
        self.freezes.observe(after.as_secs_f64());
    }

    /// A look at an object of this kind went wrong, or the watch of them.
    pub fn failed(&self, kind: &str, error: &str) {
        self.errors.get_or_create(&labels(Metric::ReconcileErrors, [kind, error])).inc();
    }

    /// Objects of this kind are watched: no error yet, which is something else than not known.
    pub fn watches(&self, kind: &str) {
        drop(self.errors.get_or_create(&labels(Metric::ReconcileErrors, [kind, "watch"])));
    }

    /// Looks at an object of this kind, and counts how long that took.
    pub async fn timed<T>(&self, kind: &str, look: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let done = look.await;
        let took = begun.elapsed().as_secs_f64();
        self.reconciles.get_or_create(&labels(Metric::Reconcile, [kind])).observe(took);
        done
    }

    /// Everything as Prometheus reads it: what was counted, then `samples`.
    ///
    /// # Errors
    /// Never, as far as is known: text in memory can be written.
    pub fn text(&self, samples: &[Sample]) -> Result<String, fmt::Error> {
        let mut now = Registry::default();
        let mut by_metric: BTreeMap<Metric, Vec<&Sample>> = BTreeMap::new();
        let version = Sample::new(Metric::BuildInfo, [env!("CARGO_PKG_VERSION")], 1.0);
        for sample in samples.iter().chain([&version]) {
            by_metric.entry(sample.metric).or_default().push(sample);
        }
        for (metric, samples) in by_metric {
            match metric.kind() {
                Kind::Counter if metric.labels().is_empty() => {
                    let counter = Counter::<f64, AtomicU64>::default();
                    for sample in samples {
                        counter.inc_by(sample.value);
                    }
                    now.register(base_name(metric), help(metric), counter);
                }
                Kind::Gauge | Kind::Histogram if metric.labels().is_empty() => {
                    let gauge = Gauge::<f64, AtomicU64>::default();
                    for sample in samples {
                        gauge.set(sample.value);
                    }
                    now.register(base_name(metric), help(metric), gauge);
                }
                Kind::Counter => {
                    let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
                    for sample in samples {
                        family.get_or_create(&named(metric, &sample.values)).inc_by(sample.value);
                    }
                    now.register(base_name(metric), help(metric), family);
                }
                Kind::Gauge | Kind::Histogram => {
                    let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
                    for sample in samples {
                        family.get_or_create(&named(metric, &sample.values)).set(sample.value);
                    }
                    now.register(base_name(metric), help(metric), family);
                }
            }
        }
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &now)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn histogram(metric: Metric) -> Histogram {
    Histogram::new(metric.buckets().iter().copied())
}

/// A metric's name without what its encoder adds.
fn base_name(metric: Metric) -> &'static str {
    let name = metric.name();
    name.strip_suffix("_total").unwrap_or(name)
}

/// Its help without the dot, which the encoder adds.
fn help(metric: Metric) -> &'static str {
    metric.help().trim_end_matches('.')
}

fn labels<const N: usize>(metric: Metric, values: [&str; N]) -> Labels {
    debug_assert_eq!(metric.labels().len(), N, "{metric}");
    metric.labels().iter().copied().zip(values.map(str::to_owned)).collect()
}

fn named(metric: Metric, values: &[String]) -> Labels {
    debug_assert_eq!(metric.labels().len(), values.len(), "{metric}");
    metric.labels().iter().copied().zip(values.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_that_is_counted_is_told_once_and_as_the_list_has_it() {
        let metrics = Metrics::new(By::Agent);
        metrics.requested("update", "vmbackups/status", "200");
        metrics.told("VmBackup", "Finalized", false);
        metrics.ended("Full", "Succeeded", "Finalized");
        metrics.failed("VmBackup", "libvirt");
        metrics.thawed(Duration::from_millis(50));
        assert_eq!(metrics.timed("VmBackup", async { 7 }).await, 7);
        let scraped: Vec<_> = Metric::ALL
            .iter()
            .filter(|metric| metric.kind() == Kind::Gauge || metric.name().starts_with("virtmark_imageio"))
            .filter(|metric| **metric != Metric::BuildInfo)
            .map(|&metric| {
                let values = metric.labels().iter().map(|label| format!("a {label}")).collect();
                Sample { metric, values, value: 1.5 }
            })
            .collect();
        let text = metrics.text(&scraped).unwrap();
        for metric in Metric::ALL {
            let head = format!("# TYPE {} {}\n", base_name(*metric), metric.kind());
            assert_eq!(text.matches(&head).count(), 1, "{head}{text}");
            let suffix = if metric.kind() == Kind::Histogram { "_count" } else { "" };
            let series = text
                .lines()
                .find(|line| line.starts_with(&format!("{metric}{suffix}")))
                .unwrap_or_else(|| panic!("{metric} has no series: {text}"));
            for label in metric.labels() {
                assert!(series.contains(&format!("{label}=\"")), "{series}: no label {label}");
            }
        }
        assert!(text.contains("virtmark_agent_freeze_seconds_bucket{le=\"0.1\"} 1\n"), "{text}");
        assert!(text.contains(
            "virtmark_api_requests_total{verb=\"update\",resource=\"vmbackups/status\",code=\"200\"} 1\n"
        ));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn names_from_outside_break_no_line() {
        let odd = "a\"b\\c\nd";
        let sample = Sample::count(Metric::LastBackup, ["vms", odd], 3);
        let text = Metrics::new(By::Operator).text(&[sample]).unwrap();
        assert!(text.contains("vm=\"a\\\"b\\\\c\\nd\"} 3.0\n"), "{text}");
        assert!(!text.contains("freeze"), "an operator freezes nobody");
    }
}
