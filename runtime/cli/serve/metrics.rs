//! GET /metrics: OpenMetrics text, which Prometheus reads.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use rewardrt::{ModelStats, Runtime};

use super::models::Models;
use super::ticket::Bounds;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    endpoint: String,
    /// A number, or `cancelled`: the client left, or did not read in time.
    status: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Endpoint {
    endpoint: String,
}

/// Seconds, from a scored sentence to a long answer.
const BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Counters of the server, and a look at the engine's.
pub struct Metrics {
    registry: Registry,
    answered: Family<Answered, Counter>,
    seconds: Family<Endpoint, Histogram>,
}

/// What is looked at when somebody asks.
pub struct Sources {
    pub runtime: Runtime,
    pub models: Arc<Models>,
    pub bounds: Arc<Bounds>,
}

impl Metrics {
    pub fn new(sources: Sources) -> Self {
        let mut registry = Registry::with_prefix("rewardrt");
        let answered = Family::<Answered, Counter>::default();
        let seconds = Family::<Endpoint, Histogram>::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register("http_requests", "Requests answered, by endpoint and status", answered.clone());
        registry.register(
            "http_request_seconds",
            "Time from a request's head to the end of its answer, streams included",
            seconds.clone(),
        );
        registry.register_collector(Box::new(Engine(sources)));
        Metrics { registry, answered, seconds }
    }

    /// Counts a request that took this long.
    pub fn answered(&self, endpoint: &str, status: &str, time: Duration) {
        let labels = Answered { endpoint: endpoint.into(), status: status.into() };
        self.answered.get_or_create(&labels).inc();
        self.seconds.get_or_create(&Endpoint { endpoint: endpoint.into() }).observe(time.as_secs_f64());
    }

    /// The text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

struct Engine(Sources);

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engine")
    }
}

type Read = fn(&ModelStats) -> f64;

/// Of each model, under the label `model`: the first of its names.
const COUNTERS: [(&str, &str, Read); 9] = [
    ("steps", "Steps run", |s| s.steps as f64),
    ("step_seconds", "Time spent in steps", |s| s.step_time.as_secs_f64()),
    ("sampled_tokens", "Tokens sampled", |s| s.sampled_tokens as f64),
    ("rows_prefill", "Rows of prompts and of scored texts", |s| s.rows.prefill as f64),
    ("rows_decode", "Rows of sampled tokens", |s| s.rows.decode as f64),
    ("rows_cached", "Rows found in the prefix cache", |s| s.rows.cached as f64),
    ("rows_recomputed", "Rows computed again after a preemption", |s| s.rows.recomputed as f64),
    ("preemptions", "Times a sequence had to make room", |s| s.preemptions as f64),
    ("kv_evictions", "KV blocks given up for others", |s| s.kv_evictions as f64),
];

const GAUGES: [(&str, &str, Read); 6] = [
    ("jobs", "Jobs that are not done", |s| s.jobs as f64),
    ("running", "Sequences that take part in steps", |s| s.running as f64),
    ("waiting", "Sequences that wait for their turn", |s| s.waiting as f64),
    ("kv_blocks", "KV blocks of 16 positions", |s| s.kv_blocks as f64),
    ("kv_blocks_used", "KV blocks that sequences use", |s| s.kv_used as f64),
    ("kv_blocks_cached", "KV blocks kept for whoever begins alike", |s| s.kv_cached as f64),
];

impl Collector for Engine {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Sources { runtime, models, bounds } = &self.0;
        let stats: Vec<(&str, ModelStats)> = models.distinct().map(|m| (m.name.as_str(), m.model.stats())).collect();
        let there = bounds.max_queue.saturating_sub(bounds.queue.available_permits());
        let under_way = bounds.max_concurrent.saturating_sub(bounds.places.available_permits());
        for (name, help, read) in COUNTERS {
            let metric = ConstCounter::new(0.0);
            let mut family = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            for (model, stats) in &stats {
                ConstCounter::new(read(stats)).encode(family.encode_family(&[("model", *model)])?)?;
            }
        }
        for (name, help, read) in GAUGES {
            let metric = ConstGauge::new(0.0);
            let mut family = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            for (model, stats) in &stats {
                ConstGauge::new(read(stats)).encode(family.encode_family(&[("model", *model)])?)?;
            }
        }
        let engine = runtime.stats();
        let alone = [
            ("http_in_flight", "Requests that are there, those that wait included", there as f64),
            (
                "http_waiting",
                "Requests that wait for their body or their place",
                there.saturating_sub(under_way) as f64,
            ),
            ("queued_tokens", "Positions that the engine's jobs can come to", engine.queued_tokens as f64),
        ];
        for (name, help, value) in alone {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
        }
        Ok(())
    }
}
