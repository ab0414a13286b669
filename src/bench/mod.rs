//! Measuring: the same work on forkdisk and on its peers, side by side.
//!
//! Always true:
//! - within a round all peers do one row one after another, and each round begins with another peer, so that what changes on the
//!   machine from minute to minute hits all of them; ratios are of samples of one round;
//! - a sample counts only with what made it durable: the time of a last flush is part of it;
//! - a sample during which others used the machine is marked, taken again, and left out where there are enough others;
//! - forkdisk is used as a user uses it: by its command, except where the row says that a call is timed.
//!
//! Not here: tables for the terminal.

mod amplify;
mod book;
mod chain;
mod files;
mod fio;
mod fork;
mod html;
mod machine;
mod peers;
mod picture;
mod quiet;
mod sharing;
mod speed;
mod stats;
mod work;

pub use book::{Better, Cell, Must, PeerNote, Report, Row, Sample, Verdict, figure};
pub use html::page;
pub use machine::Machine;
pub use peers::PeerKind;
pub use picture::picture;
pub use quiet::Others;

use crate::{
    error::{Error, Kind, Result},
    serve::awake::Mode,
    sys::signals,
};
use book::{Book, Reading};
use peers::Peer;
use quiet::Moment;
use std::{
    cell::Cell as Counter,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use work::Work;

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    /// Making disks.
    Fork,
    /// Reading.
    Read,
    /// Writing, and what a filesystem on the disk makes of it.
    Write,
    /// Deep stacks, attaching and detaching.
    Chain,
    /// Many disks that read the same.
    Sharing,
    /// Host bytes for bytes of the user.
    Amplification,
}

impl Group {
    /// All, in the order in which they are shown.
    pub const ALL: [Group; 6] = [
        Group::Read,
        Group::Write,
        Group::Fork,
        Group::Chain,
        Group::Sharing,
        Group::Amplification,
    ];
    /// The word on the command line.
    pub fn id(self) -> &'static str {
        match self {
            Group::Fork => "fork",
            Group::Read => "read",
            Group::Write => "write",
            Group::Chain => "chain",
            Group::Sharing => "sharing",
            Group::Amplification => "amplification",
        }
    }
}

/// How large everything is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// All rows, 4 GiB, five rounds: up to 40 minutes.
    Full,
    /// All rows but those that only repeat, 512 MiB: up to 4 minutes.
    Quick,
    /// To see that it works. The figures mean nothing.
    Tiny,
}

/// The numbers of a [`Level`].
#[derive(Clone, Copy, Debug)]
struct Sizes {
    level: Level,
    base: u64,
    /// Of the base, so much is read; of a private disk, so much is written.
    area: u64,
    millis: u64,
    rounds: u32,
    /// Disks that read the same, and how much.
    disks: u32,
    shared: u64,
    /// Forks before the fork that is timed; forks in a batch.
    forks: u32,
    many: &'static [u32],
    depths: &'static [u32],
    files: u32,
    transactions: u32,
    large_file: u64,
    writes: u32,
    budget: Duration,
}

impl Level {
    fn sizes(self) -> Sizes {
        const MIB: u64 = 1 << 20;
        match self {
            Level::Full => Sizes {
                level: self,
                base: 4096 * MIB,
                area: 1024 * MIB,
                millis: 2000,
                rounds: 5,
                disks: 16,
                shared: 512 * MIB,
                forks: 1000,
                many: &[1, 100, 10_000, 100_000],
                depths: &[1, 4, 16, 64, 256],
                files: 20_000,
                transactions: 2000,
                large_file: 1024 * MIB,
                writes: 10_000,
                budget: Duration::from_secs(36 * 60),
            },
            Level::Quick => Sizes {
                level: self,
                base: 512 * MIB,
                area: 128 * MIB,
                millis: 500,
                rounds: 2,
                disks: 16,
                shared: 32 * MIB,
                forks: 100,
                many: &[1, 100, 1000],
                depths: &[1, 64],
                files: 2000,
                transactions: 100,
                large_file: 128 * MIB,
                writes: 2000,
                budget: Duration::from_secs(200),
            },
            Level::Tiny => Sizes {
                level: self,
                base: 16 * MIB,
                area: 4 * MIB,
                millis: 50,
                rounds: 1,
                disks: 2,
                shared: 4 * MIB,
                forks: 3,
                many: &[1, 4],
                depths: &[1, 3],
                files: 20,
                transactions: 3,
                large_file: MIB,
                writes: 50,
                budget: Duration::from_secs(60),
            },
        }
    }
}

/// What to measure, and where.
pub struct Options {
    /// The groups, each once.
    pub groups: Vec<Group>,
    /// The peers besides forkdisk.
    pub peers: Vec<PeerKind>,
    /// How large.
    pub level: Level,
    /// Where the private directory is made.
    pub dir: PathBuf,
    /// How this was called, for the report.
    pub command: String,
}

/// Hears how far it is.
pub trait Watch {
    /// `done` of `total` steps are done, the next is `doing`.
    fn step(&self, done: u64, total: u64, doing: &str);
    /// Something worth saying.
    fn say(&self, text: &str);
}

/// What every measurement needs.
struct Lab<'a> {
    work: &'a Work,
    size: Sizes,
    watch: &'a dyn Watch,
    seed: Counter<u64>,
}

impl Lab<'_> {
    fn seed(&self) -> u64 {
        self.seed.set(self.seed.get() + 1);
        self.seed.get()
    }
}

/// Sees who used the machine while something was measured.
struct Gauge {
    mark: String,
    worst: Others,
}

impl Gauge {
    fn during<T>(&mut self, measure: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = Moment::now(&self.mark);
        let result = measure();
        let others = before.until(&Moment::now(&self.mark));
        self.worst = Others {
            used: self.worst.used.max(others.used),
            stolen: self.worst.stolen.max(others.stolen),
            disturbed: self.worst.disturbed || others.disturbed,
        };
        result
    }
}

/// Takes one sample of one or several rows.
type Measure<'a> =
    Box<dyn FnMut(&Lab<'_>, &mut Peer, &mut Gauge, u32) -> Result<Vec<Reading>> + 'a>;

/// Something to measure on every peer that can do it, once in each round.
struct Job<'a> {
    name: String,
    rounds: u32,
    peers: fn(PeerKind) -> bool,
    measure: Measure<'a>,
}

/// Runs everything and tells what came of it.
pub fn run(options: &Options, watch: &dyn Watch) -> Result<Report> {
    let started = Instant::now();
    let work = Work::new(&options.dir)?;
    let size = options.level.sizes();
    let lab = Lab {
        work: &work,
        size,
        watch,
        seed: Counter::new(0),
    };
    check(options, &lab)?;
    let mut book = Book::new(machine::describe(&work), options, size.rounds);
    let mut kinds = options.peers.clone();
    kinds.push(PeerKind::Forkdisk);
    let has = |group: Group| options.groups.contains(&group);
    // What is counted rather than timed comes last and once; it has its own disks, and its share of the time.
    let counted = has(Group::Sharing) || has(Group::Amplification);
    let timed = Group::ALL[..4].iter().any(|g| has(*g));
    if timed {
        let share = if counted { 0.75 } else { 1.0 };
        let until = started + size.budget.mul_f64(share);
        let base = work.path("base.img");
        make_base(&lab, &base, size.base)?;
        let dir = work.mkdir("timed")?;
        let mut wanted = kinds.clone();
        if has(Group::Read) || has(Group::Write) {
            wanted.extend([PeerKind::Plain, PeerKind::Cached]);
            if kinds.contains(&PeerKind::Raw) {
                wanted.push(PeerKind::CachedLoop);
            }
            wanted.extend(awake_or_not(options));
        }
        let mut peers = set_up(&lab, &mut book, &wanted, &dir, &base, true)?;
        gate(&lab, &mut book, &mut peers);
        let mut jobs = Vec::new();
        if has(Group::Read) {
            jobs.extend(speed::reads(&size, &mut book));
        }
        if has(Group::Write) {
            jobs.extend(speed::writes(&size, &mut book));
        }
        if has(Group::Fork) {
            jobs.extend(fork::jobs(&size, &mut book));
        }
        if has(Group::Chain) {
            jobs.extend(chain::jobs(&size, &mut book));
        }
        if has(Group::Write) {
            jobs.extend(files::jobs(&lab, &mut book)?);
        }
        rounds(&lab, &mut book, &mut peers, &mut jobs, size.rounds, until)?;
        drop(jobs);
        if has(Group::Write) {
            files::overlay(&lab, &mut book, &kinds)?;
        }
        if has(Group::Fork) {
            fork::many(&lab, &mut book)?;
        }
        peers.iter_mut().for_each(|p| p.close(&work));
        drop(peers);
        work.clear(&dir);
        let _ = std::fs::remove_file(base);
    }
    if counted {
        let base = work.path("base.img");
        make_base(&lab, &base, size.shared)?;
        let host = work.mkdir("counted")?;
        // What is counted stands on a filesystem of its own: what others read and write on the host's does not count.
        work.need("mkfs.ext4", "e2fsprogs")?;
        let room = size.shared * (u64::from(size.disks) + 6) + (2 << 30);
        let (dir, device) = peers::filesystem(&work, &host, "mkfs.ext4", room)?;
        let inner = dir.join("base.img");
        peers::copy(&work, &base, &inner)?;
        let mut wanted: Vec<PeerKind> = kinds.iter().copied().filter(|k| k.is_block()).collect();
        if has(Group::Sharing) && kinds.contains(&PeerKind::Qcow2) {
            wanted.push(PeerKind::Qcow2Cached);
        }
        let mut peers = Vec::new();
        for kind in wanted {
            // Filesystems of their own lie beside it, not in it.
            let own = matches!(kind, PeerKind::Xfs | PeerKind::Btrfs);
            let (place, from) = if own { (&host, &base) } else { (&dir, &inner) };
            let mut one = set_up(&lab, &mut book, &[kind], place, from, false)?;
            peers.append(&mut one);
        }
        gate(&lab, &mut book, &mut peers);
        let mut jobs = Vec::new();
        if has(Group::Amplification) {
            jobs.extend(amplify::jobs(&size, &mut book, &device));
        }
        if has(Group::Sharing) {
            jobs.extend(sharing::jobs(&size, &mut book, &device));
        }
        let until = started + size.budget;
        rounds(
            &lab,
            &mut book,
            &mut peers,
            &mut jobs,
            size.rounds.min(2),
            until,
        )?;
        drop(jobs);
        if has(Group::Sharing) && kinds.contains(&PeerKind::Overlayfs) {
            sharing::overlay(&lab, &mut book, &dir, &device)?;
        }
        peers.iter_mut().for_each(|p| p.close(&work));
    }
    drop(work);
    Ok(book.close(started.elapsed()))
}

/// Where the daemon keeps processors awake by itself: raw with such, and forkdisk with others.
fn awake_or_not(options: &Options) -> Vec<PeerKind> {
    let raw = options.peers.contains(&PeerKind::Raw);
    match options.level == Level::Full && raw && Mode::Auto.is_meant() {
        true => vec![PeerKind::RawAwake, PeerKind::Asleep],
        false => Vec::new(),
    }
}

/// What must be there before anything is made.
fn check(options: &Options, lab: &Lab<'_>) -> Result<()> {
    let has = |group: Group| options.groups.contains(&group);
    if has(Group::Read) || has(Group::Write) || has(Group::Chain) {
        fio::must_exist(lab.work)?;
    }
    crate::attach::may_attach_loops()
        .map_err(|e| e.hint("what is measured are loop devices, which need root"))?;
    let size = &lab.size;
    let kinds = &options.peers;
    let own = kinds
        .iter()
        .filter(|k| matches!(k, PeerKind::Xfs | PeerKind::Btrfs))
        .count() as u64;
    let whole = kinds
        .iter()
        .filter(|k| matches!(k, PeerKind::Raw | PeerKind::Copy | PeerKind::IoUring))
        .count() as u64;
    // Another one where forkdisk is measured a third time.
    let asleep = u64::from(!awake_or_not(options).is_empty());
    let timed = size.base * (4 + 2 * own + whole + asleep) + size.large_file * 4;
    let counted = size.shared * (u64::from(size.disks) + 6 + 2 * own);
    // What forkdisk and qcow2 write in a few seconds, the forks, and the host's own metadata.
    let wanted = timed.max(counted) * 5 / 4 + (1 << 28);
    let (free, _) = work::space(&options.dir)?;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    if free < wanted {
        let text = format!(
            "{} has {:.1} GiB free, and this takes up to {:.1} GiB for a while",
            options.dir.display(),
            gib(free),
            gib(wanted)
        );
        return Err(Error::new(Kind::NoSpace, text)
            .hint("--dir DIR measures elsewhere, --quick takes less, and so do fewer peers"));
    }
    lab.watch.say(&format!(
        "measuring in {}: up to {:.1} GiB for a while, {:.1} GiB are free",
        options.dir.display(),
        gib(wanted),
        gib(free)
    ));
    Ok(())
}

fn make_base(lab: &Lab<'_>, base: &Path, len: u64) -> Result<()> {
    let told = |done: u64| lab.watch.step(done, len, "making the base");
    peers::noise(base, len, &told)
}

/// Makes the peers. One that cannot be made is left out, and the report says why; without forkdisk there is no report.
fn set_up(
    lab: &Lab<'_>,
    book: &mut Book,
    kinds: &[PeerKind],
    dir: &Path,
    base: &Path,
    one_file: bool,
) -> Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for (i, kind) in kinds.iter().enumerate() {
        lab.watch.step(
            i as u64,
            kinds.len() as u64,
            &format!("setting up {}", kind.id()),
        );
        match Peer::new(lab.work, *kind, dir, base, one_file) {
            Ok(peer) => peers.push(peer),
            Err(e) if fatal(*kind, &e) => return Err(e),
            Err(e) => book.note(*kind, &format!("left out: {e}")),
        }
    }
    Ok(peers)
}

fn fatal(kind: PeerKind, error: &Error) -> bool {
    kind == PeerKind::Forkdisk || error.kind() == Kind::Interrupted || signals::caught()
}

/// A server that corrupts what it serves is not timed: each that is not the kernel has to prove itself.
fn gate(lab: &Lab<'_>, book: &mut Book, peers: &mut Vec<Peer>) {
    peers.retain_mut(|peer| {
        if !peer.kind.is_qemu() {
            return true;
        }
        lab.watch
            .step(0, 1, &format!("is {} correct?", peer.kind.id()));
        match speed::correct(lab, peer) {
            Ok(()) => true,
            Err(e) => {
                book.note(peer.kind, &format!("not timed: {e}"));
                false
            }
        }
    });
}

/// Round by round, job by job, peer by peer.
fn rounds(
    lab: &Lab<'_>,
    book: &mut Book,
    peers: &mut [Peer],
    jobs: &mut [Job<'_>],
    rounds: u32,
    until: Instant,
) -> Result<()> {
    let steps = |round: u32| {
        let live = jobs.iter().filter(|j| round < j.rounds);
        live.map(|j| peers.iter().filter(|p| (j.peers)(p.kind)).count() as u64)
            .sum::<u64>()
    };
    let total: u64 = (0..rounds).map(steps).sum();
    // Samples that were disturbed are taken again, but not for ever.
    let mut again = if lab.size.level == Level::Tiny {
        0
    } else {
        total / 4
    };
    let mut done = 0;
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        if round > 0 && Instant::now() + longest > until {
            book.remark(&format!(
                "{round} of {rounds} rounds: there was no time for more"
            ));
            break;
        }
        let started = Instant::now();
        for (number, job) in jobs.iter_mut().enumerate() {
            if round >= job.rounds {
                continue;
            }
            let here: Vec<usize> = (0..peers.len())
                .filter(|i| (job.peers)(peers[*i].kind))
                .collect();
            for turn in 0..here.len() {
                let peer = &mut peers[here[(turn + round as usize + number) % here.len()]];
                lab.watch
                    .step(done, total, &format!("{}: {}", job.name, peer.kind.id()));
                done += 1;
                let mut tries = 0;
                loop {
                    if signals::caught() {
                        return Err(work::interrupted());
                    }
                    let mut gauge = Gauge {
                        mark: lab.work.mark(),
                        worst: Others::default(),
                    };
                    let taken = (job.measure)(lab, peer, &mut gauge, round);
                    match taken {
                        Ok(readings) => book.enter(peer.kind, round, &readings, gauge.worst),
                        Err(e) if fatal(peer.kind, &e) => return Err(e),
                        Err(e) => {
                            book.note(peer.kind, &format!("{}: {e}", job.name));
                            break;
                        }
                    }
                    if !gauge.worst.disturbed || tries == 2 || again == 0 || Instant::now() > until
                    {
                        break;
                    }
                    tries += 1;
                    again -= 1;
                }
            }
        }
        longest = longest.max(started.elapsed());
    }
    Ok(())
}
