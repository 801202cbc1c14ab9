//! The text of one scrape.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Series of one scrape at most. What is beyond is left out, and `holdfast_metrics_series_left_out` says how many.
pub const SERIES_MAX: usize = 20_000;

/// What a number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises while the process runs; its name ends in `_total` in the text.
    Counter,
    /// A state.
    Gauge,
}

/// Labels of a series, by name.
pub type Labels<'l> = &'l [(&'static str, &'l str)];

#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    series: Vec<(Vec<(&'static str, String)>, f64)>,
}

/// Families and their series, gathered for one answer.
#[derive(Debug, Default)]
pub struct Exposition {
    families: Vec<Family>,
    series: usize,
    left_out: usize,
}

impl Exposition {
    /// Adds one series; families come in the order of their first series. `name` without `_total`.
    pub fn add(
        &mut self,
        kind: Kind,
        name: &'static str,
        help: &'static str,
        labels: Labels<'_>,
        value: f64,
    ) {
        if self.series >= SERIES_MAX {
            self.left_out += 1;
            return;
        }
        self.series += 1;
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        match self.families.iter_mut().find(|family| family.name == name) {
            Some(family) => family.series.push((labels, value)),
            None => self.families.push(Family { name, help, kind, series: vec![(labels, value)] }),
        }
    }

    /// Adds a state.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: f64) {
        self.add(Kind::Gauge, name, help, labels, value);
    }

    /// Adds a state that is or is not.
    pub fn flag(&mut self, name: &'static str, help: &'static str, is: bool) {
        self.gauge(name, help, &[], f64::from(u8::from(is)));
    }

    /// Adds a count.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: f64) {
        self.add(Kind::Counter, name, help, labels, value);
    }

    /// The text, in version 0.0.4 of Prometheus's format.
    ///
    /// # Errors
    /// When the encoder fails, which writing to memory does not.
    pub fn text(mut self) -> Result<String, std::fmt::Error> {
        let left_out = vec![(Vec::new(), self.left_out as f64)];
        self.families.push(Family {
            name: "holdfast_metrics_series_left_out",
            help: "Series that were left out of this answer to keep it bounded",
            kind: Kind::Gauge,
            series: left_out,
        });
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Gathered(self.families)));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// Hands the families to the encoder.
#[derive(Debug)]
struct Gathered(Vec<Family>);

impl Collector for Gathered {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        for family in &self.0 {
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            for (labels, value) in &family.series {
                let series = metric.encode_family(labels)?;
                match family.kind {
                    Kind::Counter => ConstCounter::new(*value).encode(series)?,
                    Kind::Gauge => ConstGauge::new(*value).encode(series)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// Prometheus's own opinion of a text; empty when it has none.
    fn promtool(text: &str) -> (bool, String) {
        let mut child = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool must be installed: Debian's package prometheus");
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    #[test]
    fn prometheus_reads_what_is_written_whatever_the_labels_hold() {
        let mut exposition = Exposition::default();
        for label in ["plain", "quote\" backslash\\ newline\n", "é 漢", ""] {
            exposition.counter("holdfast_test_things", "Things", &[("name", label)], 7.0);
            exposition.gauge("holdfast_test_level", "Level", &[("name", label), ("of", "x")], -0.5);
        }
        let text = exposition.text().unwrap();
        assert!(text.contains("holdfast_test_things_total{name=\"plain\"} 7"), "{text}");
        assert!(text.contains(r#"{name="quote\" backslash\\ newline\n",of="x"} -0.5"#), "{text}");
        assert_eq!(promtool(&text), (true, String::new()), "{text}");
        // The check itself can fail.
        assert!(!promtool("holdfast_x{ 1\n").0);
    }

    #[test]
    fn i14_series_are_bounded_and_what_is_left_out_is_counted() {
        let mut exposition = Exposition::default();
        for n in 0..SERIES_MAX + 5 {
            exposition.gauge("holdfast_test_many", "Many", &[("n", &n.to_string())], 0.0);
        }
        let text = exposition.text().unwrap();
        assert_eq!(text.lines().filter(|line| line.starts_with("holdfast_test_many{")).count(), SERIES_MAX);
        assert!(text.lines().any(|line| line.starts_with("holdfast_metrics_series_left_out 5")), "bounded");
    }
}
