//! What is read, written and kept in memory: `stats`.

use crate::{
    cli::{
        Outcome, Stop,
        context::Context,
        render::{
            json::Document,
            table::{Align, Table},
            time,
        },
    },
    daemon::{
        Client,
        stats::{AttachedStats, BaseStats, DaemonStats, JOURNAL_BYTES, metrics_of, ratio},
    },
    error::{Error, Kind, Result},
    store::{LifeWritten, Object, ObjectKind, Store},
    sys::signals,
};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use std::{
    thread,
    time::{Duration, Instant},
};

/// Show what disks read and write, and what that costs the host
#[derive(Args, Debug)]
#[command(after_help = concat!(
    "Columns: name, kind, reads, read, base, sealed, own, zero, writes, written, discards, flushes, host, amp, private, depth, ",
    "dirty, journal, cached, basecached, total, totalhost, totalamp.\n",
    "Counted is since the disk was attached, or since the daemon's last takeover; the totals are those of the disk's own layer. ",
    "AMP: bytes written to the host for each byte written to the disk."
))]
pub(crate) struct Stats {
    /// What to look at [default: all that is attached]
    #[arg(value_name = "DISK")]
    reference: Option<String>,
    /// Also disks at rest, of which only the totals are known
    #[arg(short, long, conflicts_with = "reference")]
    all: bool,
    /// Show every so many seconds what came since, until interrupted
    #[arg(
        short,
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..=86_400)
    )]
    interval: Option<u32>,
    /// The text format of Prometheus, of all that is attached
    #[arg(long, conflicts_with_all = ["reference", "all", "interval", "output", "no_header", "parsable"])]
    prometheus: bool,
    /// The columns, separated by commas
    #[arg(short = 'o', long, value_name = "COLUMNS", value_delimiter = ',')]
    output: Vec<String>,
    /// For scripts: tabs between columns, no heading
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Exact numbers: bytes
    #[arg(short, long)]
    parsable: bool,
}

/// One disk: what is counted while it is attached, and what its layer keeps.
struct Row {
    name: String,
    kind: String,
    id: String,
    size: u64,
    now: Option<AttachedStats>,
    total: Option<LifeWritten>,
    base_cached: Option<u64>,
}

impl Row {
    fn attached(stats: AttachedStats, bases: &[BaseStats]) -> Row {
        let base = bases.iter().find(|b| b.id == stats.base);
        let total = stats.total_written.zip(stats.total_host_written);
        Row {
            name: stats.name.clone(),
            kind: stats.kind.clone(),
            id: stats.id.clone(),
            size: stats.size,
            base_cached: base.and_then(|b| b.cached),
            total: total.map(|(by_user, to_host)| LifeWritten { by_user, to_host }),
            now: Some(stats),
        }
    }
    fn at_rest(object: Object, total: Option<LifeWritten>) -> Row {
        Row {
            kind: object.word().to_string(),
            name: object.name,
            id: object.id.to_string(),
            size: object.size,
            now: None,
            total,
            base_cached: None,
        }
    }
}

/// A cell: bytes, a number, a ratio, words; nothing where it is not known.
enum Cell {
    Bytes(Option<u64>),
    Number(Option<u64>),
    Ratio(Option<f64>),
    Words(String),
}

impl Cell {
    fn text(self, context: &Context, exact: bool) -> String {
        let known = match self {
            Cell::Bytes(bytes) if !exact => bytes.map(|b| context.ui.size(b)),
            Cell::Bytes(n) | Cell::Number(n) => n.map(|n| n.to_string()),
            Cell::Ratio(ratio) => ratio.map(|r| format!("{r:.2}")),
            Cell::Words(words) => Some(words),
        };
        known.unwrap_or_else(|| "-".to_string())
    }
}

/// A column: its name, its words in a list of its own, and its cell.
struct Column {
    name: &'static str,
    said: &'static str,
    cell: fn(&Row) -> Cell,
}

const USUAL: &str = "name,reads,read,base,writes,written,flushes,host,amp,private,dirty,journal";

fn column(name: &'static str, said: &'static str, cell: fn(&Row) -> Cell) -> Column {
    Column { name, said, cell }
}

fn columns() -> Vec<Column> {
    fn now(row: &Row, value: fn(&AttachedStats) -> u64) -> Option<u64> {
        row.now.as_ref().map(value)
    }
    vec![
        column("name", "name", |r| Cell::Words(r.name.clone())),
        column("kind", "kind", |r| Cell::Words(r.kind.clone())),
        column("reads", "read requests", |r| {
            Cell::Number(now(r, |s| s.requests.reads))
        }),
        column("read", "read", |r| {
            Cell::Bytes(now(r, |s| s.requests.bytes_read))
        }),
        column("base", "  from the base", |r| {
            Cell::Bytes(now(r, |s| s.from_base))
        }),
        column("sealed", "  from sealed layers", |r| {
            Cell::Bytes(now(r, |s| s.from_sealed))
        }),
        column("own", "  from its own layer", |r| {
            Cell::Bytes(now(r, |s| s.from_own))
        }),
        column("zero", "  zeros", |r| Cell::Bytes(now(r, |s| s.zeros))),
        column("writes", "write requests", |r| {
            Cell::Number(now(r, |s| s.requests.writes))
        }),
        column("written", "written", |r| {
            Cell::Bytes(now(r, |s| s.requests.bytes_written))
        }),
        column("discards", "discard requests", |r| {
            Cell::Number(now(r, |s| s.requests.discards))
        }),
        column("flushes", "flushes", |r| {
            Cell::Number(now(r, |s| s.requests.flushes))
        }),
        column("host", "written to the host", |r| {
            Cell::Bytes(now(r, |s| s.host_written))
        }),
        column("amp", "  for each byte written", |r| {
            Cell::Ratio(r.now.as_ref().and_then(AttachedStats::amplification))
        }),
        column("private", "private data", |r| {
            Cell::Bytes(now(r, |s| s.private_bytes))
        }),
        column("depth", "depth", |r| {
            Cell::Number(now(r, |s| s.depth.into()))
        }),
        column("dirty", "blocks not yet flushed", |r| {
            Cell::Number(now(r, |s| s.dirty_blocks))
        }),
        column("journal", "journal in use", |r| {
            Cell::Bytes(now(r, |s| s.journal_bytes))
        }),
        column("cached", "layer in memory", |r| {
            Cell::Bytes(r.now.as_ref().and_then(|s| s.layer_cached))
        }),
        column("basecached", "base in memory, once for all", |r| {
            Cell::Bytes(r.base_cached)
        }),
        column("total", "written over the layer's life", |r| {
            Cell::Bytes(r.total.map(|t| t.by_user))
        }),
        column("totalhost", "  to the host", |r| {
            Cell::Bytes(r.total.map(|t| t.to_host))
        }),
        column("totalamp", "  for each byte written", |r| {
            Cell::Ratio(r.total.and_then(|t| ratio(t.to_host, t.by_user)))
        }),
    ]
}

impl Stats {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        if self.prometheus {
            let text = metrics_of(&store)?;
            return match ui.json {
                true => ui.document(json!({"metrics": text})),
                false => ui.data(text),
            };
        }
        let chosen = self.choose()?;
        let (daemon, mut rows) = self.look(&store)?;
        self.show(context, &chosen, daemon.as_ref(), &rows)?;
        let Some(seconds) = self.interval else {
            return Ok(());
        };
        signals::catch();
        let mut next = Instant::now();
        loop {
            next += Duration::from_secs(seconds.into());
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                if signals::caught() {
                    return Err(Stop::Code(Kind::Interrupted.exit_code()));
                }
                thread::sleep(left.min(Duration::from_millis(50)));
            }
            let (daemon, now) = self.look(&store)?;
            let since = |row: &Row| Row {
                now: row.now.as_ref().map(|stats| {
                    let same = |r: &&Row| r.name == row.name;
                    let earlier = rows.iter().find(same).and_then(|r| r.now.as_ref());
                    earlier.map_or_else(|| stats.clone(), |then| stats.after(then))
                }),
                name: row.name.clone(),
                kind: row.kind.clone(),
                id: row.id.clone(),
                ..*row
            };
            let came: Vec<Row> = now.iter().map(since).collect();
            if !ui.json && !self.no_header {
                ui.data("\n")?;
            }
            self.show(context, &chosen, daemon.as_ref(), &came)?;
            rows = now;
        }
    }

    /// What is counted now.
    fn look(&self, store: &Store) -> Result<(Option<DaemonStats>, Vec<Row>)> {
        let object = match &self.reference {
            Some(reference) => Some(store.resolve_any(reference)?),
            None => None,
        };
        let client = Client::connect(store)?;
        let daemon = client.map(|mut c| c.stats()).transpose()?;
        let attached = daemon.as_ref().map_or(&[][..], |d| &d.disks);
        let bases = daemon.as_ref().map_or(&[][..], |d| &d.bases);
        // A snapshot or image may be attached under another of its names.
        let meant = |s: &&AttachedStats| {
            object.as_ref().is_none_or(|o| {
                s.name == o.name || (o.kind != ObjectKind::Disk && s.id == o.id.to_string())
            })
        };
        let mut rows: Vec<Row> = attached
            .iter()
            .filter(meant)
            .map(|s| Row::attached(s.clone(), bases))
            .collect();
        for row in rows.iter_mut().filter(|row| row.total.is_none()) {
            // Sealed, or a disk that can only be read: what its layer keeps. A name that is gone has nothing to tell.
            if let Ok(object) = store.resolve(&row.name) {
                row.total = store.life_written(&object)?;
            }
        }
        let rest = match object {
            Some(object) if rows.is_empty() => vec![object],
            None if self.all => {
                let mut disks = store.list()?;
                disks.retain(|o| o.kind == ObjectKind::Disk);
                disks.retain(|o| rows.iter().all(|row| row.name != o.name));
                disks
            }
            _ => Vec::new(),
        };
        for object in rest {
            let total = store.life_written(&object)?;
            rows.push(Row::at_rest(object, total));
        }
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((daemon, rows))
    }

    /// The columns of `-o`, or the usual ones.
    fn choose(&self) -> Result<Vec<Column>> {
        let wish: Vec<&str> = match &self.output[..] {
            [] => USUAL.split(',').collect(),
            wish => wish.iter().map(|w| w.trim()).collect(),
        };
        wish.iter()
            .map(|wish| {
                let wish = wish.to_ascii_lowercase();
                let found = columns().into_iter().find(|c| c.name == wish);
                found.ok_or_else(|| {
                    let known: Vec<&str> = columns().iter().map(|c| c.name).collect();
                    Error::new(Kind::Invalid, format!("there is no column `{wish}`"))
                        .hint(format!("the columns are {}", known.join(", ")))
                })
            })
            .collect()
    }

    fn show(
        &self,
        context: &Context,
        chosen: &[Column],
        daemon: Option<&DaemonStats>,
        rows: &[Row],
    ) -> Outcome {
        let ui = &context.ui;
        if ui.json {
            let document = StatsDoc::new(daemon, rows);
            if self.interval.is_none() {
                return ui.document(document);
            }
            // One document a line, as there is no end of them.
            let line = serde_json::to_string(&Document::new(document));
            let line = line.map_err(|e| Error::new(Kind::Io, format!("cannot write JSON: {e}")))?;
            return ui.data(line + "\n");
        }
        if let ([row], true) = (rows, self.is_a_list()) {
            return ui.data(list(context, row));
        }
        let exact = self.parsable;
        let mut table = Table::new(chosen.iter().map(|c| {
            let align = match c.name {
                "name" | "kind" => Align::Left,
                _ => Align::Right,
            };
            (c.name.to_ascii_uppercase(), align)
        }));
        for row in rows {
            let cells = chosen.iter().map(|c| (c.cell)(row).text(context, exact));
            table.row(cells.collect());
        }
        if self.no_header {
            return ui.data(table.script());
        }
        if table.is_empty() {
            ui.talk("nothing is attached: --all shows disks at rest");
            return Ok(());
        }
        ui.data(table.text(true))
    }
    /// One disk, and no wish for columns: a line for each.
    fn is_a_list(&self) -> bool {
        let plain = !self.no_header && !self.parsable && self.output.is_empty();
        plain && self.reference.is_some() && self.interval.is_none()
    }
}

/// Everything about one disk, a line each.
fn list(context: &Context, row: &Row) -> String {
    let mut table = Table::new([(String::new(), Align::Left), (String::new(), Align::Left)]);
    for column in columns() {
        let mut text = (column.cell)(row).text(context, false);
        match (column.name, &row.now) {
            ("journal", Some(stats)) if stats.total_written.is_some() => {
                text = format!("{text} of {}", context.ui.size(JOURNAL_BYTES));
            }
            _ => {}
        }
        if text != "-" {
            table.row(vec![column.said.to_string(), text]);
        }
    }
    if let Some(stats) = &row.now {
        let since = time::ago(stats.since, time::now());
        table.row(vec!["counted since".to_string(), since]);
    }
    table.text(false)
}

#[derive(Serialize)]
struct StatsDoc {
    daemon: Option<DaemonDoc>,
    disks: Vec<DiskDoc>,
    bases: Vec<BaseDoc>,
}

#[derive(Serialize)]
struct DaemonDoc {
    uptime_seconds: u64,
    threads: u64,
    takeovers: u64,
    awake_seconds: Option<f64>,
    read_requests: u64,
    read_bytes: u64,
    write_requests: u64,
    written_bytes: u64,
    discard_requests: u64,
    discarded_bytes: u64,
    flushes: u64,
    errors: u64,
    in_flight: u64,
}

#[derive(Serialize)]
struct BaseDoc {
    id: String,
    length: u64,
    cached_bytes: Option<u64>,
    attached: u64,
}

/// What is only counted while a disk is attached is `null` of one at rest.
#[derive(Serialize)]
struct DiskDoc {
    name: String,
    kind: String,
    id: String,
    size: u64,
    attached: bool,
    since: Option<u64>,
    read_requests: Option<u64>,
    read_bytes: Option<u64>,
    read_from_base: Option<u64>,
    read_from_sealed: Option<u64>,
    read_from_own: Option<u64>,
    read_zeros: Option<u64>,
    write_requests: Option<u64>,
    written_bytes: Option<u64>,
    discard_requests: Option<u64>,
    discarded_bytes: Option<u64>,
    flushes: Option<u64>,
    errors: Option<u64>,
    host_written_bytes: Option<u64>,
    amplification: Option<f64>,
    private_bytes: Option<u64>,
    depth: Option<u32>,
    dirty_blocks: Option<u64>,
    journal_bytes: Option<u64>,
    journal_size: Option<u64>,
    layer_cached_bytes: Option<u64>,
    base_id: Option<String>,
    base_cached_bytes: Option<u64>,
    quota: Option<u64>,
    quota_used: Option<u64>,
    waiting: Option<u64>,
    history_bytes: Option<u64>,
    total_written_bytes: Option<u64>,
    total_host_written_bytes: Option<u64>,
    total_amplification: Option<f64>,
}

impl StatsDoc {
    fn new(daemon: Option<&DaemonStats>, rows: &[Row]) -> StatsDoc {
        let bases = daemon.map_or(&[][..], |d| &d.bases);
        StatsDoc {
            daemon: daemon.map(|d| DaemonDoc {
                uptime_seconds: d.uptime_seconds,
                threads: d.threads,
                takeovers: d.takeovers,
                awake_seconds: d.awake_seconds,
                read_requests: d.requests.reads,
                read_bytes: d.requests.bytes_read,
                write_requests: d.requests.writes,
                written_bytes: d.requests.bytes_written,
                discard_requests: d.requests.discards,
                discarded_bytes: d.requests.bytes_discarded,
                flushes: d.requests.flushes,
                errors: d.requests.errors,
                in_flight: d.requests.in_flight,
            }),
            disks: rows.iter().map(DiskDoc::new).collect(),
            bases: bases
                .iter()
                .map(|b| BaseDoc {
                    id: b.id.clone(),
                    length: b.length,
                    cached_bytes: b.cached,
                    attached: b.disks,
                })
                .collect(),
        }
    }
}

impl DiskDoc {
    fn new(row: &Row) -> DiskDoc {
        let now = row.now.as_ref();
        let requests = now.map(|s| s.requests);
        let total = row.total;
        DiskDoc {
            name: row.name.clone(),
            kind: row.kind.clone(),
            id: row.id.clone(),
            size: row.size,
            attached: now.is_some(),
            since: now.map(|s| s.since),
            read_requests: requests.map(|r| r.reads),
            read_bytes: requests.map(|r| r.bytes_read),
            read_from_base: now.map(|s| s.from_base),
            read_from_sealed: now.map(|s| s.from_sealed),
            read_from_own: now.map(|s| s.from_own),
            read_zeros: now.map(|s| s.zeros),
            write_requests: requests.map(|r| r.writes),
            written_bytes: requests.map(|r| r.bytes_written),
            discard_requests: requests.map(|r| r.discards),
            discarded_bytes: requests.map(|r| r.bytes_discarded),
            flushes: requests.map(|r| r.flushes),
            errors: requests.map(|r| r.errors),
            host_written_bytes: now.map(|s| s.host_written),
            amplification: now.and_then(AttachedStats::amplification),
            private_bytes: now.map(|s| s.private_bytes),
            depth: now.map(|s| s.depth),
            dirty_blocks: now.map(|s| s.dirty_blocks),
            journal_bytes: now.map(|s| s.journal_bytes),
            journal_size: now.map(|_| JOURNAL_BYTES),
            layer_cached_bytes: now.and_then(|s| s.layer_cached),
            base_id: now.map(|s| s.base.clone()),
            base_cached_bytes: row.base_cached,
            quota: now.and_then(|s| s.quota),
            quota_used: now.and_then(|s| s.quota_used),
            waiting: now.map(|s| s.waiting),
            history_bytes: now.map(|s| s.history_bytes),
            total_written_bytes: total.map(|t| t.by_user),
            total_host_written_bytes: total.map(|t| t.to_host),
            total_amplification: total.and_then(|t| ratio(t.to_host, t.by_user)),
        }
    }
}
