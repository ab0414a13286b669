//! Loop devices that dead daemons left behind.
//!
//! A device outlives the daemon that served its file: it gives I/O errors, but it is there, and it stays as long as it is
//! mounted. Once the daemon's own mount is taken away the kernel no longer says whose file it was. So before that
//! happens the devices are written down, each with the number of this use of it, which no other use ever has.

use super::{MOUNT, keeper::loop_devices_over};
use crate::attach;
use crate::error::{Error, Kind, Result};
use crate::store::Store;
use crate::sys::{holders, loopdev};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::{
    thread,
    time::{Duration, Instant},
};

/// The file in the run directory that lists them.
const LIST: &str = "dead";

/// A loop device that a dead daemon left behind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dead {
    /// The device.
    pub device: PathBuf,
    /// Which use of it.
    use_of: u64,
    /// Name of the object that it showed.
    pub name: String,
}

impl Dead {
    fn there(&self) -> bool {
        loopdev::backing_file(&self.device).is_some()
            && loopdev::sequence(&self.device) == Some(self.use_of)
    }
    /// Takes it away. It must not be mounted any more; who else uses it has `patience` to leave.
    pub fn take_away(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let Err(e) = loopdev::detach_dead(&self.device, self.use_of) else {
                return Ok(());
            };
            let users = holders::of_device(&self.device, None).unwrap_or_default();
            let may_pass = e.kind() == Kind::Busy && holders::for_moments(&users);
            if may_pass && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            return Err(match users.is_empty() {
                true => e,
                false => e.context(format!(
                    "{} is in use: {}",
                    self.device.display(),
                    holders::describe(&users)
                )),
            });
        }
    }
}

/// The first line of the list: which boot it is of.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| "\n".into())
}

/// What the list says, without devices that are gone.
fn listed(run_dir: &Path) -> Vec<Dead> {
    let text = fs::read_to_string(run_dir.join(LIST)).unwrap_or_default();
    // After another boot the numbers mean nothing: they begin anew.
    let Some(text) = text.strip_prefix(&boot()) else {
        return Vec::new();
    };
    let line = |line: &str| {
        let mut words = line.split(' ');
        let dead = Dead {
            device: words.next()?.into(),
            use_of: words.next()?.parse().ok()?,
            name: words.next()?.to_string(),
        };
        dead.there().then_some(dead)
    };
    text.lines().filter_map(line).collect()
}

/// Devices over files of the mount. Nobody serves them any more: the caller knows.
fn over(mount: &Path) -> Vec<Dead> {
    let dead = |device: PathBuf| {
        let file = loopdev::backing_file(&device)?;
        Some(Dead {
            use_of: loopdev::sequence(&device)?,
            name: file.file_name()?.to_string_lossy().into_owned(),
            device,
        })
    };
    loop_devices_over(mount)
        .into_iter()
        .filter_map(dead)
        .collect()
}

/// All devices of dead daemons of this store. `living`: a daemon runs, so that what is over its mount is not dead.
pub fn dead_devices(store: &Store, living: bool) -> Vec<Dead> {
    let run_dir = store.run_dir();
    let mut all = listed(&run_dir);
    if !living && let Ok(mount) = std::path::absolute(run_dir.join(MOUNT)) {
        for dead in over(&mount) {
            if !all.contains(&dead) {
                all.push(dead);
            }
        }
    }
    all
}

/// Writes down what is over the mount of a dead daemon, before the mount goes.
pub(super) fn note(run_dir: &Path, mount: &Path) {
    let mut all = listed(run_dir);
    for dead in over(mount) {
        if !all.contains(&dead) {
            all.push(dead);
        }
    }
    write(run_dir, &all);
}

/// Of a link in the place of the file, nothing is written where it leads.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(text.as_bytes())
}

fn write(run_dir: &Path, all: &[Dead]) {
    let path = run_dir.join(LIST);
    if all.is_empty() {
        let _ = fs::remove_file(path);
        return;
    }
    let line = |d: &Dead| format!("{} {} {}\n", d.device.display(), d.use_of, d.name);
    let text: String = std::iter::once(boot())
        .chain(all.iter().map(line))
        .collect();
    // Replaced as a whole: it may be read at this moment.
    let new = run_dir.join(format!("{LIST}.new"));
    let written = write_new(&new, &text).and_then(|()| fs::rename(&new, &path));
    if let Err(e) = written {
        let e = Error::io("write", path, &e);
        tracing::warn!("dead devices are not remembered: {e}");
    }
}

/// Takes away what nobody uses any more; the rest stays listed.
pub(super) fn take_away_idle(run_dir: &Path) {
    let mut left = Vec::new();
    for dead in listed(run_dir) {
        let shown = dead.device.display();
        let mounts = attach::mounts_of(&dead.device).unwrap_or_default();
        if let Some(dir) = mounts.first() {
            let dir = dir.display();
            tracing::warn!("{shown} of a dead daemon is still mounted: `forkdisk detach {dir}`");
            left.push(dead);
            continue;
        }
        match dead.take_away(Duration::ZERO) {
            Ok(()) => tracing::info!("{shown} of a dead daemon was taken away"),
            Err(e) => {
                tracing::warn!("{shown} of a dead daemon stays: {e}");
                left.push(dead);
            }
        }
    }
    write(run_dir, &left);
}
