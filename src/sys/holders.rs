//! Who keeps a device or a mount busy, so that an error can name them.
//!
//! Only links and tables under `/proc` are read, never the files they point to: those may be served by
//! a process that is dead. What cannot be read (another user's process, one that just ended) is left
//! out, so an empty answer is no proof.

use crate::{
    error::Result,
    sys::{loopdev, mounts, process},
};
use std::{
    collections::HashSet,
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Something that keeps a device or a mount in use.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Holder {
    /// A process.
    Process {
        /// Its number.
        pid: i32,
        /// Its short name.
        comm: String,
        /// In what way.
        how: How,
    },
    /// A mount of the device, and a process in whose namespace it is.
    Mount {
        /// Where it is mounted.
        at: PathBuf,
        /// A process that sees it, if not this one.
        seen_by: Option<i32>,
    },
    /// Another block device on top (device mapper, md).
    Device(String),
    /// The device is swap space in use.
    Swap,
}

/// In what way a process uses it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum How {
    /// It has it, or a file on it, open.
    Open,
    /// Its working directory is there.
    WorkingDirectory,
    /// Its root directory is there.
    Root,
    /// It runs a program from there.
    Program,
    /// It has mapped a file from there.
    Mapping,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { pid, comm, how } => {
                let how = match how {
                    How::Open => "has it open",
                    How::WorkingDirectory => "has its working directory there",
                    How::Root => "has its root directory there",
                    How::Program => "runs from there",
                    How::Mapping => "has a file mapped from there",
                };
                write!(f, "{comm} (pid {pid}) {how}")
            }
            Holder::Mount { at, seen_by: None } => write!(f, "it is mounted on {}", at.display()),
            Holder::Mount {
                at,
                seen_by: Some(pid),
            } => {
                write!(
                    f,
                    "it is mounted on {} in the namespace of pid {pid}",
                    at.display()
                )
            }
            Holder::Device(name) => write!(f, "the device {name} is built on it"),
            Holder::Swap => f.write_str("it is in use as swap space"),
        }
    }
}

/// Might they all be gone in a moment? A process that looks in (`blkid`, udev's) is; so is a namespace of mounts that was copied with this mount
/// in it, as those of services and containers that begin are, until they leave it behind.
pub fn for_moments(holders: &[Holder]) -> bool {
    let passing = |holder: &Holder| {
        matches!(
            holder,
            Holder::Process { .. }
                | Holder::Mount {
                    seen_by: Some(_),
                    ..
                }
        )
    };
    holders.iter().all(passing)
}

/// Most holders a message names; more would bury the sentence.
const NAMED: usize = 5;

/// The holders in one phrase.
pub fn describe(holders: &[Holder]) -> String {
    let mut text: Vec<String> = holders.iter().take(NAMED).map(Holder::to_string).collect();
    if holders.len() > NAMED {
        text.push(format!("and {} more", holders.len() - NAMED));
    }
    text.join("; ")
}

/// Numbers of all processes.
fn pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

fn links(dir: &Path) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| Some((e.path(), fs::read_link(e.path()).ok()?)))
}

/// Processes that have the file of this path open, as the kernel calls it.
pub fn of_file(path: &Path) -> Vec<Holder> {
    let has =
        |pid: &i32| links(&PathBuf::from(format!("/proc/{pid}/fd"))).any(|(_, to)| to == path);
    pids()
        .into_iter()
        .filter(has)
        .filter_map(|pid| {
            Some(Holder::Process {
                pid,
                comm: process::comm(pid)?,
                how: How::Open,
            })
        })
        .collect()
}

/// Who uses a block device: mounts in any namespace, devices on top, swap, and processes that have it open, `server` apart.
pub fn of_device(device: &Path, server: Option<i32>) -> Result<Vec<Holder>> {
    let rdev = loopdev::rdev(device)?;
    let mut holders = Vec::new();
    let mut namespaces = HashSet::new();
    namespaces.extend(fs::read_link("/proc/self/ns/mnt"));
    for mount in mounts::list()?
        .into_iter()
        .filter(|m| m.is_of(device, rdev))
    {
        holders.push(Holder::Mount {
            at: mount.mount_point,
            seen_by: None,
        });
    }
    let name = device.file_name().unwrap_or_default();
    let on_top = fs::read_dir(Path::new("/sys/block").join(name).join("holders"));
    for entry in on_top.into_iter().flatten().flatten() {
        holders.push(Holder::Device(
            entry.file_name().to_string_lossy().into_owned(),
        ));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps
        .lines()
        .skip(1)
        .any(|l| l.split_whitespace().next().map(Path::new) == Some(device))
    {
        holders.push(Holder::Swap);
    }
    for pid in pids() {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        if let Ok(namespace) = fs::read_link(proc.join("ns/mnt"))
            && namespaces.insert(namespace)
        {
            let text = fs::read(proc.join("mountinfo")).unwrap_or_default();
            for mount in mounts::parse(&text)
                .into_iter()
                .filter(|m| m.is_of(device, rdev))
            {
                holders.push(Holder::Mount {
                    at: mount.mount_point,
                    seen_by: Some(pid),
                });
            }
        }
        if server == Some(pid) {
            continue;
        }
        // By name first, then by number: to stat a file we know nothing of could wait for ever.
        let opens = links(&proc.join("fd")).any(|(link, target)| {
            target.file_name() == Some(name) && fs::metadata(link).is_ok_and(|m| m.rdev() == rdev)
        });
        if opens && let Some(comm) = process::comm(pid) {
            holders.push(Holder::Process {
                pid,
                comm,
                how: How::Open,
            });
        }
    }
    Ok(holders)
}

/// Which processes use what is mounted at `mount_point`, or below it.
pub fn of_mount(mount_point: &Path) -> Vec<Holder> {
    let inside = |path: &Path| path.starts_with(mount_point);
    let mut holders = Vec::new();
    for pid in pids() {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let points_inside = |link: &str| fs::read_link(proc.join(link)).is_ok_and(|t| inside(&t));
        let how = if links(&proc.join("fd")).any(|(_, target)| inside(&target)) {
            How::Open
        } else if points_inside("cwd") {
            How::WorkingDirectory
        } else if points_inside("root") {
            How::Root
        } else if points_inside("exe") {
            How::Program
        } else if maps(&proc).any(|path| inside(&path)) {
            How::Mapping
        } else {
            continue;
        };
        if let Some(comm) = process::comm(pid) {
            holders.push(Holder::Process { pid, comm, how });
        }
    }
    holders
}

/// Paths of the files a process has mapped.
fn maps(proc: &Path) -> impl Iterator<Item = PathBuf> {
    let text = fs::read(proc.join("maps")).unwrap_or_default();
    let lines: Vec<PathBuf> = text
        .split(|&c| c == b'\n')
        .filter_map(|line| {
            let start = line.iter().position(|&c| c == b'/')?;
            Some(PathBuf::from(
                String::from_utf8_lossy(&line[start..]).into_owned(),
            ))
        })
        .collect();
    lines.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_and_a_working_directory_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let _file = fs::File::create(dir.join("open")).unwrap();
        let me = std::process::id() as i32;
        let found = of_mount(&dir);
        assert!(
            found
                .iter()
                .any(|h| matches!(h, Holder::Process { pid, how: How::Open, .. } if *pid == me)),
            "{found:?}"
        );
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(&dir)
            .spawn()
            .unwrap();
        let found = of_mount(&dir);
        child.kill().unwrap();
        child.wait().unwrap();
        let text = describe(&found);
        assert!(
            text.contains(&format!(
                "sleep (pid {}) has its working directory there",
                child.id()
            )),
            "{text}"
        );
    }
}
