//! What the daemon counts, in the text exposition format of Prometheus, version 0.0.4.
//!
//! Pure: numbers in, text out. Names begin with `forkdisk_`, sizes are bytes, what only grows ends in `_total`. A count begins anew when a server
//! takes over, or a disk is attached again, which is what the format expects of counters.

use super::stats::{AttachedStats, DaemonStats, JOURNAL_BYTES};
use crate::serve::files::Stats;
use crate::units::Id;
use std::fmt::Display;

/// What a metric is.
#[derive(Clone, Copy)]
enum Type {
    Counter,
    Gauge,
}

struct Text(String);

impl Text {
    /// A family of metrics: its head, and a line for each sample. A family without samples is left out.
    fn family<V: Display>(
        &mut self,
        name: &str,
        kind: Type,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'static str, String)>, V)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let word = match kind {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
        };
        let out = &mut self.0;
        out.push_str(&format!(
            "# HELP forkdisk_{name} {help}\n# TYPE forkdisk_{name} {word}\n"
        ));
        for (labels, value) in samples {
            let labels: Vec<String> = labels
                .iter()
                .map(|(label, value)| format!("{label}=\"{}\"", escape(value)))
                .collect();
            let labels = match &labels[..] {
                [] => String::new(),
                all => format!("{{{}}}", all.join(",")),
            };
            out.push_str(&format!("forkdisk_{name}{labels} {value}\n"));
        }
    }
    /// A metric without labels.
    fn one<V: Display>(&mut self, name: &str, kind: Type, help: &str, value: V) {
        self.family(name, kind, help, [(Vec::new(), value)]);
    }
}

/// The value of a label.
fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out
}

/// All metrics of a store; `None` where no daemon runs.
pub fn text(store: Id, stats: Option<&DaemonStats>) -> String {
    use Type::{Counter, Gauge};
    let mut text = Text(String::new());
    let build = vec![
        ("version", env!("CARGO_PKG_VERSION").to_string()),
        ("store", store.to_string()),
    ];
    text.family(
        "info",
        Gauge,
        "The program and the store that this is about; always 1.",
        [(build, 1)],
    );
    text.one(
        "up",
        Gauge,
        "Does a daemon serve the store?",
        u8::from(stats.is_some()),
    );
    let Some(stats) = stats else {
        return text.0;
    };
    text.one(
        "attached_disks",
        Gauge,
        "Disks, snapshots and images that are attached.",
        stats.disks.len(),
    );
    text.one(
        "uptime_seconds",
        Gauge,
        "Seconds since the present server of the daemon began.",
        stats.uptime_seconds,
    );
    text.one(
        "threads",
        Gauge,
        "Threads that serve requests.",
        stats.threads,
    );
    text.one(
        "takeovers_total",
        Counter,
        "Servers that another one followed while disks stayed attached.",
        stats.takeovers,
    );
    text.family(
        "awake_seconds_total",
        Counter,
        "Seconds that idle processors were kept awake while requests followed each other.",
        stats.awake_seconds.map(|s| (Vec::new(), s)),
    );
    requests(&mut text, &stats.requests);
    let bases = |value: fn(&super::stats::BaseStats) -> Option<u64>| {
        stats
            .bases
            .iter()
            .filter_map(move |b| Some((vec![("base", b.id.clone())], value(b)?)))
    };
    text.family(
        "base_size_bytes",
        Gauge,
        "Length of the image of a base that something attached stands on.",
        bases(|b| Some(b.length)),
    );
    text.family(
        "base_cached_bytes",
        Gauge,
        "Bytes of the image in the page cache, one copy for all disks over it.",
        bases(|b| b.cached),
    );
    text.family(
        "base_attached_disks",
        Gauge,
        "Attached disks, snapshots and images over the base.",
        bases(|b| Some(b.disks)),
    );
    disks(&mut text, &stats.disks);
    text.0
}

/// Requests for all disks together, also of those that were detached since.
fn requests(text: &mut Text, stats: &Stats) {
    let of = |kind: &str, n: u64| (vec![("kind", kind.to_string())], n);
    text.family(
        "requests_total",
        Type::Counter,
        "Requests for all disks.",
        [
            of("read", stats.reads),
            of("write", stats.writes),
            of("discard", stats.discards),
            of("flush", stats.flushes),
        ],
    );
    text.family(
        "request_bytes_total",
        Type::Counter,
        "Bytes of the requests for all disks.",
        [
            of("read", stats.bytes_read),
            of("write", stats.bytes_written),
            of("discard", stats.bytes_discarded),
        ],
    );
    text.one(
        "request_errors_total",
        Type::Counter,
        "Requests that failed.",
        stats.errors,
    );
    text.one(
        "requests_in_flight",
        Type::Gauge,
        "Requests that are being served now.",
        stats.in_flight,
    );
}

fn disks(text: &mut Text, disks: &[AttachedStats]) {
    use Type::{Counter, Gauge};
    let label = |d: &AttachedStats| ("disk", d.name.clone());
    let mut each =
        |name: &str, kind: Type, help: &str, value: fn(&AttachedStats) -> Option<u64>| {
            let samples = disks
                .iter()
                .filter_map(|d| Some((vec![label(d)], value(d)?)));
            text.family(name, kind, help, samples);
        };
    each("disk_read_requests_total", Counter, "Read requests.", |d| {
        Some(d.requests.reads)
    });
    each("disk_read_bytes_total", Counter, "Bytes read.", |d| {
        Some(d.requests.bytes_read)
    });
    each(
        "disk_write_requests_total",
        Counter,
        "Write requests.",
        |d| Some(d.requests.writes),
    );
    each(
        "disk_written_bytes_total",
        Counter,
        "Bytes that users wrote.",
        |d| Some(d.requests.bytes_written),
    );
    each(
        "disk_discard_requests_total",
        Counter,
        "Requests to discard or to write zeros.",
        |d| Some(d.requests.discards),
    );
    each(
        "disk_discarded_bytes_total",
        Counter,
        "Bytes discarded or written as zeros.",
        |d| Some(d.requests.bytes_discarded),
    );
    each("disk_flushes_total", Counter, "Flush requests.", |d| {
        Some(d.requests.flushes)
    });
    each("disk_errors_total", Counter, "Requests that failed.", |d| {
        Some(d.requests.errors)
    });
    each(
        "disk_host_written_bytes_total",
        Counter,
        "Bytes written to the layer files of the disk: data, journal, block maps, superblocks.",
        |d| Some(d.host_written),
    );
    each(
        "disk_private_bytes",
        Gauge,
        "Bytes of data in the disk's own layer.",
        |d| Some(d.private_bytes),
    );
    each(
        "disk_depth",
        Gauge,
        "Layers between the disk and its base, its own included.",
        |d| Some(d.depth.into()),
    );
    each(
        "disk_dirty_blocks",
        Gauge,
        "Changes of the block map that no flush has made durable.",
        |d| Some(d.dirty_blocks),
    );
    each(
        "disk_journal_bytes",
        Gauge,
        "Bytes of the journal in use.",
        |d| Some(d.journal_bytes),
    );
    each(
        "disk_journal_size_bytes",
        Gauge,
        "Bytes that the journal has room for.",
        |_| Some(JOURNAL_BYTES),
    );
    each(
        "disk_quota_bytes",
        Gauge,
        "Bytes that the disk may have for itself, where that is limited.",
        |d| d.quota,
    );
    each(
        "disk_quota_used_bytes",
        Gauge,
        "Bytes of its quota that the disk has used.",
        |d| d.quota_used,
    );
    each(
        "disk_waiting_writes",
        Gauge,
        "Writes that wait until the quota of the disk leaves room for them.",
        |d| Some(d.waiting),
    );
    each(
        "disk_history_bytes",
        Gauge,
        "Bytes that the history of the disk occupies.",
        |d| Some(d.history_bytes),
    );
    each(
        "disk_life_written_bytes",
        Gauge,
        "Bytes that users wrote to the disk, over its life.",
        |d| d.total_written,
    );
    each(
        "disk_life_host_written_bytes",
        Gauge,
        "Bytes written to the files of the disk's layers, over its life.",
        |d| d.total_host_written,
    );
    each(
        "disk_layer_cached_bytes",
        Gauge,
        "Bytes of the file of the uppermost layer in the page cache.",
        |d| d.layer_cached,
    );
    let sources = disks.iter().flat_map(|d| {
        let of = move |source: &str, n| (vec![label(d), ("source", source.to_string())], n);
        [
            of("base", d.from_base),
            of("sealed", d.from_sealed),
            of("own", d.from_own),
            of("zero", d.zeros),
        ]
    });
    text.family(
        "disk_source_bytes_total",
        Counter,
        "Bytes that were read in whole blocks, by where they came from.",
        sources,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// A strict reader of the format: the samples by name and labels.
    fn parse(text: &str) -> BTreeMap<String, f64> {
        assert!(text.ends_with('\n') && !text.contains('\r'));
        let (mut types, mut helped) = (BTreeMap::new(), BTreeSet::new());
        let mut samples = BTreeMap::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help text");
                assert!(!help.is_empty() && !help.contains('\\'), "{line}");
                assert!(helped.insert(name.to_string()), "twice: {line}");
                family = name.to_string();
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                assert_eq!(name, family, "the type follows its help");
                assert!(["counter", "gauge"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                types.insert(name.to_string(), kind.to_string());
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let name = series.split('{').next().expect("a name");
            assert_eq!(name, family, "samples of a family stand together: {line}");
            assert!(types.contains_key(name), "no type: {line}");
            let sound = |c: char| c.is_ascii_alphanumeric() || c == '_';
            assert!(
                name.starts_with("forkdisk_") && name.chars().all(sound),
                "{line}"
            );
            labels(&series[name.len()..]);
            let value: f64 = value.parse().expect("a number");
            assert!(value >= 0.0 && value.is_finite(), "{line}");
            let old = samples.insert(series.to_string(), value);
            assert!(old.is_none(), "twice: {line}");
        }
        samples
    }

    /// Labels in braces, with their escapes undone.
    fn labels(text: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        if text.is_empty() {
            return found;
        }
        let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
        let mut rest = inner.expect("braces");
        loop {
            let (name, tail) = rest.split_once("=\"").expect("a label");
            assert!(name.chars().all(|c| c.is_ascii_lowercase()), "{text}");
            let mut value = String::new();
            let mut chars = tail.char_indices();
            let end = loop {
                match chars.next().expect("the value ends") {
                    (at, '"') => break at + 1,
                    (_, '\\') => value.push(match chars.next().expect("an escape").1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        c => panic!("\\{c} is no escape: {text}"),
                    }),
                    (_, c) => value.push(c),
                }
            };
            found.push((name.to_string(), value));
            match tail[end..].strip_prefix(',') {
                Some(more) => rest = more,
                None => {
                    assert_eq!(&tail[end..], "", "{text}");
                    return found;
                }
            }
        }
    }

    fn disk(name: &str, written: u64) -> AttachedStats {
        AttachedStats {
            name: name.to_string(),
            from_base: 8192,
            total_written: Some(written),
            requests: Stats {
                bytes_written: written,
                ..Stats::default()
            },
            ..AttachedStats::default()
        }
    }

    #[test]
    fn the_text_is_what_the_format_says() {
        let odd = "we\"ird\\na@s";
        let stats = DaemonStats {
            disks: vec![disk("web-1", 7), disk(odd, u64::MAX)],
            bases: vec![super::super::stats::BaseStats {
                id: Id([7; 16]).to_string(),
                length: 10,
                cached: None,
                disks: 2,
            }],
            takeovers: 3,
            awake_seconds: Some(1.5),
            ..DaemonStats::default()
        };
        let samples = parse(&text(Id([1; 16]), Some(&stats)));
        assert_eq!(samples["forkdisk_up"], 1.0);
        assert_eq!(samples["forkdisk_attached_disks"], 2.0);
        assert_eq!(samples["forkdisk_takeovers_total"], 3.0);
        assert_eq!(samples["forkdisk_awake_seconds_total"], 1.5);
        assert_eq!(
            samples["forkdisk_disk_written_bytes_total{disk=\"web-1\"}"],
            7.0
        );
        let source = "forkdisk_disk_source_bytes_total{disk=\"web-1\",source=\"base\"}";
        assert_eq!(samples[source], 8192.0);
        let named: BTreeSet<String> = samples
            .keys()
            .filter(|series| series.starts_with("forkdisk_disk_depth"))
            .map(|series| labels(&series["forkdisk_disk_depth".len()..])[0].1.clone())
            .collect();
        let both = ["web-1", odd].map(str::to_string);
        assert_eq!(named, BTreeSet::from(both));
        // What is not known is left out, not zero.
        assert!(!samples.keys().any(|s| s.contains("cached")));
    }

    #[test]
    fn without_a_daemon_it_says_so() {
        let samples = parse(&text(Id([1; 16]), None));
        assert_eq!(samples["forkdisk_up"], 0.0);
        assert_eq!(samples.len(), 2);
    }
}
