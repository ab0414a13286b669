//! What the server counts: for `stats`, and as metrics.

use super::Attached;
use super::client::Client;
use super::entry::Phase;
use super::metrics;
use super::server::Server;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::JOURNAL_SLOTS;
use crate::io::File;
use crate::serve::files::Stats;
use crate::store::Store;
use crate::sys::cachestat;
use crate::units::{BLOCK, Id};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a daemon counts. Counts of requests begin with its present server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DaemonStats {
    /// Seconds since the present server began.
    pub uptime_seconds: u64,
    /// Threads that serve requests now.
    pub threads: u64,
    /// Servers that another one followed.
    pub takeovers: u64,
    /// Seconds that processors were kept awake while requests followed each other; `None`: they never are.
    pub awake_seconds: Option<f64>,
    /// Requests for all files that there were.
    pub requests: Stats,
    /// What is attached, by name.
    pub disks: Vec<AttachedStats>,
    /// The bases under it.
    pub bases: Vec<BaseStats>,
}

/// What is counted of something that is attached: since it was attached, or since the present server took it over.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachedStats {
    /// The name it was attached by.
    pub name: String,
    /// What it is: `base`, `image`, `snap`, `disk`.
    pub kind: String,
    /// Id of its layer or base.
    pub id: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Since when it is counted: seconds since 1970.
    pub since: u64,
    /// Requests.
    pub requests: Stats,
    /// Bytes read from the base.
    pub from_base: u64,
    /// Bytes read from sealed layers.
    pub from_sealed: u64,
    /// Bytes read from its own layer.
    pub from_own: u64,
    /// Bytes read that were zeros.
    pub zeros: u64,
    /// Bytes written to the files of its layers: data, journal, block maps, superblocks.
    pub host_written: u64,
    /// Bytes of data in its own layer.
    pub private_bytes: u64,
    /// Layers above the base, its own included.
    pub depth: u32,
    /// Changes of its block map that no flush has made durable.
    pub dirty_blocks: u64,
    /// Bytes of its journal in use, of [`JOURNAL_BYTES`].
    pub journal_bytes: u64,
    /// Bytes that users wrote into its own layer, over the layer's life; `None` for what can only be read.
    pub total_written: Option<u64>,
    /// Bytes written to the file of its own layer, over the layer's life.
    pub total_host_written: Option<u64>,
    /// Bytes of the file of its uppermost layer that are in the host's page cache, where that is known.
    pub layer_cached: Option<u64>,
    /// Id of its base, one of [`DaemonStats::bases`].
    pub base: String,
    /// Bytes that it may have for itself; `None`: as many as there are.
    pub quota: Option<u64>,
    /// Bytes of its quota that it has used.
    pub quota_used: Option<u64>,
    /// Writes that wait until the quota leaves room for them.
    pub waiting: u64,
    /// Bytes that its history occupies.
    pub history_bytes: u64,
}

/// A base that something attached stands on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BaseStats {
    /// Its id.
    pub id: String,
    /// Bytes of its image.
    pub length: u64,
    /// Bytes of it that are in the host's page cache, once for all disks; `None` where that is not known (before Linux 6.5).
    pub cached: Option<u64>,
    /// How many of what is attached stand on it.
    pub disks: u64,
}

/// Bytes that a journal has room for.
pub const JOURNAL_BYTES: u64 = JOURNAL_SLOTS as u64 * BLOCK;

impl AttachedStats {
    fn of(
        attached: &Attached,
        (since, waiting): (u64, u64),
        requests: Stats,
        disk: &CowDisk,
    ) -> AttachedStats {
        let stats = disk.stats();
        let layer = stats.layer;
        AttachedStats {
            name: attached.name.clone(),
            kind: attached.kind.word().to_string(),
            id: attached.id.to_string(),
            size: disk.size(),
            since,
            requests,
            from_base: stats.from_base * BLOCK,
            from_sealed: stats.from_sealed * BLOCK,
            from_own: stats.from_own * BLOCK,
            zeros: stats.zeros * BLOCK,
            host_written: stats.host_written,
            private_bytes: stats.private_blocks.0 * BLOCK,
            depth: stats.depth,
            dirty_blocks: layer.map_or(0, |l| l.dirty),
            journal_bytes: layer.map_or(0, |l| l.journal),
            total_written: layer.map(|l| l.user_written),
            total_host_written: layer.map(|l| l.host_written),
            layer_cached: disk.layer_file().and_then(|file| cached(&*file)),
            base: disk.base().0.to_string(),
            quota: disk.quota_bytes(),
            quota_used: disk.quota_bytes().map(|_| disk.used()),
            waiting,
            history_bytes: disk.history_bytes(),
        }
    }
    /// What came since `earlier`; what is no count is as it is now. Counts that began anew meanwhile are as they are.
    pub fn after(&self, earlier: &AttachedStats) -> AttachedStats {
        if self.since != earlier.since || self.requests.reads < earlier.requests.reads {
            return self.clone();
        }
        let (now, then) = (&self.requests, &earlier.requests);
        let less = u64::saturating_sub;
        AttachedStats {
            requests: Stats {
                reads: less(now.reads, then.reads),
                writes: less(now.writes, then.writes),
                flushes: less(now.flushes, then.flushes),
                discards: less(now.discards, then.discards),
                errors: less(now.errors, then.errors),
                bytes_read: less(now.bytes_read, then.bytes_read),
                bytes_written: less(now.bytes_written, then.bytes_written),
                bytes_discarded: less(now.bytes_discarded, then.bytes_discarded),
                ..*now
            },
            from_base: less(self.from_base, earlier.from_base),
            from_sealed: less(self.from_sealed, earlier.from_sealed),
            from_own: less(self.from_own, earlier.from_own),
            zeros: less(self.zeros, earlier.zeros),
            host_written: less(self.host_written, earlier.host_written),
            ..self.clone()
        }
    }
    /// Bytes written to the host for each byte that users wrote; `None` if they wrote nothing.
    pub fn amplification(&self) -> Option<f64> {
        ratio(self.host_written, self.requests.bytes_written)
    }
}

/// `host` for each of `user`; `None` for none.
pub fn ratio(host: u64, user: u64) -> Option<f64> {
    (user > 0).then(|| host as f64 / user as f64)
}

/// Bytes of a file in the page cache, where that is known.
fn cached(file: &dyn File) -> Option<u64> {
    cachestat::cached(file.fd()?).ok()
}

impl Server {
    /// What is counted now.
    fn stats(&self) -> DaemonStats {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let began = now.map_or(0, |now| {
            now.saturating_sub(self.started.elapsed()).as_secs()
        });
        let open: Vec<(Attached, u64, Option<Arc<CowDisk>>)> = {
            let table = self.table.lock();
            table
                .values()
                .filter(|e| e.phase == Phase::Ready)
                .map(|e| (e.attached.clone(), e.ino, e.disk.clone()))
                .collect()
        };
        let mut bases: BTreeMap<Id, BaseStats> = BTreeMap::new();
        let mut disks = Vec::new();
        for (attached, ino, disk) in open {
            // What could not be taken over has nothing to tell.
            let Some(disk) = disk else { continue };
            let (id, image) = disk.base();
            let base = bases.entry(id).or_insert_with(|| BaseStats {
                id: id.to_string(),
                length: image.len().unwrap_or(0),
                cached: cached(&*image),
                disks: 0,
            });
            base.disks += 1;
            let file = self.files.get(ino);
            let since = file.as_ref().map_or(0, |f| f.since().max(began));
            let requests = file.and_then(|f| f.info()).map(|i| i.stats);
            let requests = requests.unwrap_or_default();
            let waiting = self.session.waiting(Some(ino)) as u64;
            disks.push(AttachedStats::of(
                &attached,
                (since, waiting),
                requests,
                &disk,
            ));
        }
        DaemonStats {
            uptime_seconds: self.started.elapsed().as_secs(),
            threads: self.session.threads().0 as u64,
            takeovers: self.before,
            awake_seconds: self.awake_seconds(),
            requests: self.files.total(),
            disks,
            bases: bases.into_values().collect(),
        }
    }
    /// The answer to `stats`.
    pub(super) fn stats_said(&self) -> Result<Value> {
        let stats = serde_json::to_value(self.stats()).map_err(|e| unreadable(&e))?;
        Ok(json!({"stats": stats}))
    }
    /// The answer to `metrics`.
    pub(super) fn metrics_said(&self) -> Value {
        json!({"metrics": metrics::text(self.store.id(), Some(&self.stats()))})
    }
}

impl Client {
    /// What the daemon counts.
    pub fn stats(&mut self) -> Result<DaemonStats> {
        let mut answer = self.ask_again(json!({"op": "stats"}))?;
        serde_json::from_value(answer["stats"].take()).map_err(|e| unreadable(&e))
    }
    /// The same in the text format of Prometheus.
    pub fn metrics(&mut self) -> Result<String> {
        let answer = self.ask_again(json!({"op": "metrics"}))?;
        Ok(super::protocol::text(&answer, "metrics")?.to_string())
    }
}

/// What the daemon of a store counts, in the text format of Prometheus; that none runs is said by it, too.
pub fn metrics_of(store: &Store) -> Result<String> {
    match Client::connect(store)? {
        Some(mut client) => client.metrics(),
        None => Ok(metrics::text(store.id(), None)),
    }
}

fn unreadable(e: &serde_json::Error) -> Error {
    Error::new(
        Kind::Invalid,
        format!("what the daemon counts cannot be read: {e}"),
    )
    .hint("command and daemon may be of different versions: restart the daemon")
}
