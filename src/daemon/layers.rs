//! The layers below attached disks: files of theirs that were replaced, and stretches that can be joined while nobody waits.
//!
//! Policy of the joining: when [`STRETCH`] or more neighbouring layers have no name and one child each, nobody can ever need one of them alone, and
//! they become one: in the background, at most [`RATE`] bytes a second, and given up when the disk is detached or the server leaves. What has a
//! name is never touched. `FORKDISK_AUTO_SQUASH=0` in the daemon's environment switches it off.
//!
//! A layer below an attached disk that has lost its name gives back what nobody sees ([`Store::reclaim_open`](crate::store::Store::reclaim_open)): at
//! once, and again whenever a chain has got another layer on top, for then more of it may be hidden.

use super::client::Client;
use super::protocol::{number, object, object_json, text};
use super::server::Server;
use crate::disk::CowDisk;
use crate::error::{Kind, Result};
use crate::store::{Object, Progress, Reclaimed};
use crate::units::Id;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// So many layers are worth joining.
const STRETCH: usize = 16;
/// Bytes copied in a second at most.
const RATE: u64 = 64 << 20;
/// How often chains are looked at.
const PAUSE: Duration = Duration::from_secs(2);
/// So long, at each look, space that seals left is given back to the host; it costs those who write and sync.
const GIVING: Duration = Duration::from_millis(200);
/// So many pieces of it while nobody can change names.
const PIECES: usize = 16;
/// To look at nameless layers takes at most one part in so many of the time: nobody else uses the names meanwhile.
const SHARE: u32 = 50;
/// How long a chain in which nothing was found is left alone at most; at first it is [`PAUSE`].
const LONGEST: Duration = Duration::from_secs(300);

/// May the daemon join layers by itself?
pub(super) fn wanted() -> bool {
    std::env::var_os("FORKDISK_AUTO_SQUASH").is_none_or(|v| v != "0")
}

impl Server {
    fn disks(&self) -> Vec<(String, Arc<CowDisk>)> {
        let table = self.table.lock();
        let open = table
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.disk.clone()?)));
        open.collect()
    }
    /// Lets every attached disk read through the files that its layers have now; returns how many had others. One that cannot goes on with those
    /// it has open.
    pub(super) fn rechain(&self) -> u64 {
        let mut changed = 0;
        let names: Vec<String> = self.table.lock().keys().cloned().collect();
        for name in names {
            // One at a time: whoever holds a disk keeps its layer locked.
            let attached = self.table.lock().get(&name).and_then(|e| e.disk.clone());
            let Some(disk) = attached else { continue };
            match self.store.rechain(&disk) {
                Ok(true) => changed += 1,
                Ok(false) => {}
                Err(e) => tracing::warn!(disk = name, "goes on with the files it has open: {e}"),
            }
        }
        changed
    }
    /// Gives back what nobody sees of nameless layers below attached disks.
    fn reclaim(&self) -> Result<Reclaimed> {
        self.nameless.store(true, SeqCst);
        // Whoever joins layers reads all of them. He is asked again.
        let Some(_joining) = self.joining.try_lock() else {
            return Ok(Reclaimed::default());
        };
        let mut done = self.store.reclaim_open()?;
        if !done.shrunk.is_empty() {
            self.rechain();
            // Nobody reads by the former maps now.
            done.left = self.store.reclaim_open()?.left;
            tracing::info!(
                bytes = done.bytes,
                layers = done.shrunk.len(),
                "blocks that nobody sees were given back"
            );
        }
        if done.left == 0 {
            self.nameless.store(false, SeqCst);
        }
        Ok(done)
    }
    /// What `rechain`, `reclaim` and `seal` answer.
    pub(super) fn answer_on_layers(&self, request: &Value) -> Result<Value> {
        match text(request, "op")? {
            "rechain" => return Ok(json!({"changed": self.rechain()})),
            "reclaim" => {
                let done = self.reclaim()?;
                let shrunk = done.shrunk.iter().map(|id| id.to_string());
                return Ok(json!({"bytes": done.bytes, "shrunk": shrunk.collect::<Vec<_>>()}));
            }
            _ => {}
        }
        let disk = text(request, "disk")?;
        let running = self.running(disk)?;
        let object = self.store.seal_open(&running, disk)?;
        self.refresh(disk);
        Ok(json!({"object": object_json(&object)}))
    }
    /// Joins what nobody needs one by one below an attached disk; says whether there was anything.
    fn join_idle(&self, name: &str, disk: Arc<CowDisk>) -> Result<bool> {
        let _joining = self.joining.lock();
        let _below = JoinsBelow::new(&self.joins_below, name);
        let found = self.store.idle_stretch(name, &disk, STRETCH)?;
        // It may be detached while layers are copied: then nothing of it may be held here.
        drop(disk);
        let Some(squash) = found else {
            return Ok(false);
        };
        let (layers, top) = (squash.layers, squash.top);
        let gently = Gently {
            server: self,
            name,
            began: Instant::now(),
        };
        let done = self.store.squash(squash, &gently).inspect_err(|e| {
            if e.kind() == Kind::Interrupted {
                self.store.drop_replacement(top);
            }
        })?;
        self.rechain();
        let freed = done.replaced + self.store.collect_former(&done.former)?;
        tracing::info!(
            disk = name,
            layers,
            copied = done.copied,
            freed,
            "layers without names were joined"
        );
        Ok(true)
    }
}

/// Says of which disk the layers are that are being joined, as long as this lives.
struct JoinsBelow<'a>(&'a Mutex<Option<String>>);

impl<'a> JoinsBelow<'a> {
    fn new(below: &'a Mutex<Option<String>>, name: &str) -> JoinsBelow<'a> {
        *below.lock() = Some(name.to_string());
        JoinsBelow(below)
    }
}

impl Drop for JoinsBelow<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// Keeps to the rate, and ends the work when it is not wanted any more.
struct Gently<'a> {
    server: &'a Server,
    name: &'a str,
    began: Instant,
}

impl Progress for Gently<'_> {
    fn update(&self, done: u64, _: u64) -> bool {
        let due = Duration::from_secs_f64(done as f64 / RATE as f64);
        loop {
            let attached = self.server.table.lock().contains_key(self.name);
            if self.server.leaving.load(SeqCst) || !attached {
                return false;
            }
            let left = due.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// When a chain is looked at again.
struct Look {
    depth: usize,
    at: Instant,
    wait: Duration,
}

/// When nameless layers are looked at again.
#[derive(Default)]
struct Nameless {
    /// The chains at the last look.
    seen: u64,
    at: Option<Instant>,
    wait: Duration,
    /// Not before this, whatever changes.
    soon: Option<Instant>,
}

impl Nameless {
    /// Looks if a chain has changed, and not too often: all names of the store are read for it.
    fn look(&mut self, server: &Server) {
        let mut hash = DefaultHasher::new();
        let mut nameless = server.nameless.load(SeqCst);
        for (_, disk) in server.disks() {
            let chain = disk.chain();
            // What has its name still may have lost it since; then the daemon was told.
            let below = chain.layers().iter().skip(1);
            nameless |= below.clone().any(|l| l.superblock().name().is_none());
            let ids = chain.layers().iter().map(|layer| layer.id());
            ids.collect::<Vec<_>>().hash(&mut hash);
        }
        if !nameless {
            return;
        }
        let chains = hash.finish();
        if chains != std::mem::replace(&mut self.seen, chains) {
            (self.wait, self.at) = (PAUSE, self.soon);
        }
        let began = Instant::now();
        if self.at.is_some_and(|at| began < at) {
            return;
        }
        self.wait = match server.reclaim() {
            Ok(done) if done.bytes > 0 => PAUSE,
            Ok(_) => (self.wait * 2).min(LONGEST),
            Err(e) => {
                tracing::info!("nothing was given back: {e}");
                LONGEST
            }
        };
        let ended = Instant::now();
        self.soon = Some(ended + (ended - began) * SHARE);
        self.at = self.soon.max(Some(ended + self.wait));
    }
}

/// Looks after the chains of attached disks, as long as the server lives.
pub(super) fn look_after(server: &Server) {
    // Of this thread alone. Without it the rest goes on as well.
    let _ = rustix::process::setpriority_process(None, 19);
    let mut looks: BTreeMap<String, Look> = BTreeMap::new();
    let mut nameless = Nameless::default();
    loop {
        std::thread::sleep(PAUSE);
        if server.leaving.load(SeqCst) {
            continue;
        }
        nameless.look(server);
        let began = Instant::now();
        while began.elapsed() < GIVING && server.store.give_back_idle(PIECES) {
            // Whoever waits for the names comes in between.
            std::thread::sleep(Duration::from_millis(3));
        }
        if !wanted() {
            continue;
        }
        let names: Vec<String> = server.disks().into_iter().map(|(name, _)| name).collect();
        looks.retain(|name, _| names.contains(name));
        for name in names {
            // One at a time: whoever holds a disk keeps its layer locked, and to join layers takes long.
            let attached = server.table.lock().get(&name).and_then(|e| e.disk.clone());
            let Some(disk) = attached else { continue };
            let depth = disk.chain().depth();
            if depth < STRETCH || server.leaving.load(SeqCst) {
                continue;
            }
            let now = Instant::now();
            let look = looks.entry(name.clone()).or_insert(Look {
                depth: 0,
                at: now,
                wait: PAUSE,
            });
            if look.depth != depth {
                (look.depth, look.at, look.wait) = (depth, now, PAUSE);
            }
            if now < look.at {
                continue;
            }
            match server.join_idle(&name, disk) {
                Ok(true) => {}
                Ok(false) => look.wait = (look.wait * 2).min(LONGEST),
                Err(e) => {
                    tracing::info!(disk = name, "layers were not joined: {e}");
                    look.wait = LONGEST;
                }
            }
            look.at = Instant::now() + look.wait;
        }
    }
}

impl Client {
    /// Tells the daemon that files of layers were replaced; how many attached disks had others open.
    pub fn rechain(&mut self) -> Result<u64> {
        number(&self.ask_again(json!({"op": "rechain"}))?, "changed")
    }
    /// Lets the daemon give back what nobody sees of nameless layers below attached disks: bytes, and the layers they were of.
    pub fn reclaim(&mut self) -> Result<(u64, Vec<Id>)> {
        let answer = self.ask_again(json!({"op": "reclaim"}))?;
        let shrunk = answer["shrunk"].as_array().into_iter().flatten();
        let shrunk = shrunk.filter_map(|id| Id::parse(id.as_str()?));
        Ok((number(&answer, "bytes")?, shrunk.collect()))
    }
    /// Seals the layer of an attached disk, if it holds anything or stands on a base.
    pub fn seal(&mut self, disk: &str) -> Result<Object> {
        let answer = self.ask(json!({"op": "seal", "disk": disk}))?;
        object(&answer["object"])
    }
}
